"""A real MLflow server that can be killed and restarted on the same port."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from tests.helpers.ports import reserve_port

START_SECONDS = 180.0


class TrackingServer:
    """`mlflow server` over a sqlite database, artifacts stored at a destination."""

    def __init__(
        self, folder: Path, destination: str, environment: Mapping[str, str], *, python: str = sys.executable
    ) -> None:
        self.folder, self.destination, self.port, self.python = folder, destination, reserve_port(), python
        self.environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.environment |= environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def launch(self) -> None:
        """Start the server; it answers some seconds later."""
        arguments = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--workers",
            "1",
            "--port",
            str(self.port),
        ]
        arguments += ["--host", "127.0.0.1", "--artifacts-destination", self.destination]
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [self.python, "-m", "mlflow", "server", *arguments],
                stdout=log,
                stderr=log,
                env=os.environ | {"PATH": f"{Path(self.python).parent}:{os.environ['PATH']}"} | self.environment,
                start_new_session=True,
            )

    def start(self) -> None:
        """Start the server and wait until it answers."""
        self.launch()
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert self._process is not None
            assert self._process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
            assert time.monotonic() < deadline, "mlflow server does not answer"
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all processes of the server, as a power cut does."""
        if self._process is not None:
            os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False
