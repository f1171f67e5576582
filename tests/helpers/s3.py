"""A real S3 server (rclone) with signed requests, and a proxy in front of it that injects faults."""

import http.client
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.helpers.ports import reserve_port

KEY, SECRET, BUCKET = "avcil", "a-secret-of-the-tests", "bucket"
START_SECONDS = 20.0


def find_rclone() -> str | None:
    """The program, of this environment or of the system."""
    return shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")


class S3Server:
    """`rclone serve s3` over a folder; its buckets are the folder's folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = reserve_port()
        self._process: subprocess.Popen[bytes] | None = None
        (folder / BUCKET).mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        rclone = find_rclone()
        assert rclone
        words = ["serve", "s3", str(self.folder), "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}"]
        self._process = subprocess.Popen(
            [rclone, "--config", "/dev/null", *words, "--vfs-cache-mode", "off"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "rclone serve s3 ended"
            assert time.monotonic() < deadline, "rclone serve s3 does not answer"
            time.sleep(0.02)

    def kill(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0


class FaultyProxy:
    """Proxy of a server. Every `every`-th read of a shard gets a fault of `faults`, in turn.

    "refuse": 503 · "cut": half the body, then the connection is closed · "stall": half the body, then nothing ·
    "reset": the connection is reset at once.
    """

    def __init__(self, server: S3Server, *, every: int, faults: tuple[str, ...]) -> None:
        self.server, self.every, self.faults = server, every, faults
        self.injected: Counter[str] = Counter()
        self.paths: Counter[str] = Counter()
        self._count, self._lock, self._closing = 0, threading.Lock(), threading.Event()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.pass_on(self)

            do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 (the names that http.server calls)

            def log_message(self, format: str, *arguments: object) -> None:
                """Log nothing."""

        self._listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._listener.daemon_threads = True
        self._thread = threading.Thread(target=self._listener.serve_forever, daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def close(self) -> None:
        self._closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def pass_on(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        fault = self._next_fault(handler)
        if fault == "refuse":
            handler.send_response(503)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        if fault == "reset":
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
            handler.close_connection = True
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        upstream.request(handler.command, handler.path, body=body, headers=dict(handler.headers))
        answer = upstream.getresponse()
        data = answer.read()
        handler.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                handler.send_header(name, value)
        handler.send_header("Content-Length", answer.headers.get("Content-Length") or str(len(data)))
        handler.end_headers()
        handler.wfile.write(data[: len(data) // 2] if fault else data)
        upstream.close()
        if fault:
            handler.wfile.flush()
            handler.close_connection = True
            if fault == "stall":
                self._closing.wait(START_SECONDS)

    def _next_fault(self, handler: BaseHTTPRequestHandler) -> str | None:
        if handler.command != "GET" or not handler.path.split("?")[0].endswith(".tar"):
            return None
        with self._lock:
            self._count += 1
            self.paths[handler.path] += 1
            if self._count % self.every:
                return None
            fault = self.faults[self._count // self.every % len(self.faults)]
            self.injected[fault] += 1
            return fault
