"""Sandbox: a SLURM of two nodes with accounting on this machine, as root and without systemd or cgroups.

All of its files are in one folder, except for one line of the hosts file, by which ranks on two nodes find each
other. It installs nothing and does not change a SLURM of the system.
"""

import functools
import itertools
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from filelock import FileLock
from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import Field
from typing_extensions import TypedDict

from avcil_dist import storage
from avcil_dist.system.trusted_files import user_cache
from launch.environments import slurm_client_environment
from launch.sandbox.daemons import REMEDY, Daemons, SandboxError, command_of, processes_with, wait_until

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sacct": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
NODES = ("avcil-node1", "avcil-node2")
CPUS_PER_NODE = 4
HOSTS = Path("/etc/hosts")
MARK = "# avcil sandbox"
MAX_SOCKET_PATH = 100
START_SECONDS, STOP_SECONDS = 60.0, 15.0
USER_PORTS = range(1024, 65536)
CONNECTION_PORTS = Path("/proc/sys/net/ipv4/ip_local_port_range")  # for connections, and for port 0
SYSTEM_PATHS = "/usr/local/sbin:/usr/sbin:/sbin"  # folders of daemons, which not every user has on the path


class _Settings(TypedDict):
    ports: dict[Annotated[str, Field(max_length=100)], Annotated[int, Field(gt=0, lt=1 << 16)]]
    password: Annotated[str, Field(pattern=r"^[0-9a-f]{1,200}$")]


def default_folder() -> Path:
    """Return the default folder of the sandbox."""
    return user_cache() / "avcil-sandbox"


@dataclass(frozen=True)
class Sandbox:
    """The sandbox of a folder, whether it runs or not."""

    folder: Path

    @property
    def conf(self) -> Path:
        """The file for SLURM_CONF, by which sbatch, squeue and the like find this SLURM."""
        return self.folder / "slurm.conf"

    @property
    def daemons(self) -> Daemons:
        """The daemons of the sandbox."""
        return Daemons(self.folder)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the daemons, in the order in which they start."""
        return ("munged", "mariadb", "slurmdbd", "slurmctld", *(f"slurmd-{node}" for node in NODES))

    def up(self) -> None:
        """Start all daemons that do not run. Raises SandboxError for missing packages and for a daemon that fails."""
        _check_machine(self.folder)
        (self.folder / "log").mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)
        with FileLock(self.folder / "up.lock"):
            self._write_files()
            self._start_accounting()
            self._start_slurm()

    def down(self) -> None:
        """Cancel all jobs, end all daemons, and kill processes that jobs left behind."""
        daemons = self.daemons
        if daemons.is_running("slurmctld"):
            if jobs := self._jobs():
                self.run("scancel", *jobs, check=False)
            wait_until(lambda: not self._jobs(), STOP_SECONDS)
        for name in reversed(self.names):
            daemons.stop(name, STOP_SECONDS)
        for pid in self.leftovers():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._write_hosts(())

    def leftovers(self) -> list[int]:
        """Return the processes that jobs left behind, slurmstepd first.

        A slurmstepd without its slurmd continues to kill the process ids of its job, which by then may be those of
        other processes.
        """
        found = processes_with(f"SLURM_CONF={self.conf}")
        steps = [pid for pid in found if command_of(pid).startswith("slurmstepd")]
        return steps + [pid for pid in processes_with(f"SLURM_CONF={self.conf}", "SLURM_JOB_ID=") if pid not in steps]

    def status(self) -> dict[str, int | None]:
        """Return each daemon's process id; None for a daemon that does not run."""
        return {name: self.daemons.pid(name) for name in self.names}

    def run(self, *command: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run a command of SLURM on this sandbox. Raises SandboxError when it fails, unless `check` is false."""
        done = subprocess.run(command, env=self.environment(), capture_output=True, text=True)
        if check and done.returncode:
            raise SandboxError(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")
        return done

    def environment(self) -> dict[str, str]:
        """Return the environment of SLURM's programs and daemons, with the variables that select this SLURM."""
        selected = {"SLURM_CONF": str(self.conf), "PATH": f"{os.environ['PATH']}:{SYSTEM_PATHS}"}
        return slurm_client_environment(os.environ) | selected

    def _jobs(self) -> list[str]:
        return self.run("squeue", "--noheader", "--format=%i", check=False).stdout.split()

    def _write_files(self) -> None:
        """Write the configuration. Ports are chosen once: a second `up` must not change those of running daemons."""
        settings_file = self.folder / "settings.json"
        if not settings_file.exists():
            names = ["slurmctld", "slurmdbd", "mariadb", *NODES]
            settings_file.touch(mode=0o600)
            settings_file.write_text(
                json.dumps(
                    {"ports": dict(zip(names, free_ports(len(names)), strict=True)), "password": secrets.token_hex()}
                )
            )
        settings = _read_settings(settings_file) | {
            "folder": str(self.folder),
            "host": socket.gethostname().split(".")[0],
            "nodes": NODES,
            "cpus": CPUS_PER_NODE,
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        }
        _write_secret(self.conf, _render("slurm.conf.j2", settings), mode=0o644)
        _write_secret(self.folder / "slurmdbd.conf", _render("slurmdbd.conf.j2", settings))
        user = "'slurm'@'127.0.0.1'", "'slurm'@'localhost'"
        _write_secret(
            self.folder / "users.sql",
            "".join(
                f"CREATE USER IF NOT EXISTS {name} IDENTIFIED BY '{settings['password']}';\n"
                f"GRANT ALL ON slurm_accounting.* TO {name};\n"
                for name in user
            ),
        )
        key = self.folder / "munge.key"
        if not key.exists():
            _write_secret(key, secrets.token_hex(64))
        for name in ("slurmctld", *(f"slurmd-{node}" for node in NODES)):
            (self.folder / name).mkdir(exist_ok=True)

    def _write_hosts(self, names: tuple[str, ...]) -> None:
        """Replace this sandbox's line of the hosts file, in place: others read it meanwhile, and it may be a mount."""
        text = HOSTS.read_bytes()
        changed = hosts_of(text.decode(), self.folder, names).encode()
        if changed != text:
            with HOSTS.open("r+b", buffering=0) as file:
                file.write(changed.ljust(len(text), b"\n"))  # in one call, never shorter than what is there
                file.truncate(len(changed))

    def _start_accounting(self) -> None:
        daemons, environment, folder = self.daemons, self.environment(), self.folder
        socket_path = folder / "munge.socket"
        munged = ["munged", "--foreground", "--force", f"--socket={socket_path}", f"--key-file={folder / 'munge.key'}"]
        munged += [f"--pid-file={folder / 'munged.pid'}", f"--log-file={folder / 'log' / 'munged.log'}"]
        daemons.start("munged", [*munged, f"--seed-file={folder / 'munge.seed'}"], environment)
        daemons.require("munged", socket_path.exists, START_SECONDS)

        data = folder / "mariadb"
        if not (data / "mysql").is_dir():
            self.run(
                "mariadb-install-db",
                "--no-defaults",
                "--user=root",
                f"--datadir={data}",
                "--skip-test-db",
                "--auth-root-authentication-method=socket",
            )
        port = _read_settings(folder / "settings.json")["ports"]
        mariadbd = ["mariadbd", "--no-defaults", "--user=root", f"--datadir={data}", "--bind-address=127.0.0.1"]
        mariadbd += [f"--port={port['mariadb']}", f"--socket={folder / 'mariadb.socket'}"]
        mariadbd += [f"--pid-file={folder / 'mariadb.pid'}", f"--init-file={folder / 'users.sql'}"]
        daemons.start("mariadb", [*mariadbd, "--innodb-lock-wait-timeout=900"], environment)
        daemons.require("mariadb", lambda: _listens(port["mariadb"]), START_SECONDS)
        daemons.start("slurmdbd", ["slurmdbd", "-D"], environment)
        daemons.require("slurmdbd", lambda: _listens(port["slurmdbd"]), START_SECONDS)

    def _start_slurm(self) -> None:
        daemons, environment = self.daemons, self.environment()
        self._write_hosts(NODES)
        self.run("sacctmgr", "--immediate", "add", "cluster", "avcil-sandbox", check=False)  # fails where it exists
        daemons.start("slurmctld", ["slurmctld", "-D", "-f", str(self.conf)], environment)
        daemons.require("slurmctld", lambda: not self.run("scontrol", "ping", check=False).returncode, START_SECONDS)
        for node in NODES:
            daemons.start(f"slurmd-{node}", ["slurmd", "-D", "-N", node, "-f", str(self.conf)], environment)
        for node in NODES:
            daemons.require(f"slurmd-{node}", functools.partial(self._is_ready, node), START_SECONDS)

    def _is_ready(self, node: str) -> bool:
        """Whether the controller accepts jobs for the node."""
        state = self.run("sinfo", "--noheader", f"--nodes={node}", "--partition=low", "--format=%T", check=False).stdout
        return state.strip() in ("idle", "mixed", "allocated", "completing")


def hosts_of(text: str, folder: Path, names: Sequence[str]) -> str:
    """Return the hosts file `text` with these names of the sandbox in `folder`.

    Lines of other sandboxes stay while their folders are there: one that was killed and deleted left its line.
    """
    lines = []
    for line in text.splitlines():
        _, mark, other = line.partition(f" {MARK} ")
        if not mark or (other != str(folder) and Path(other).is_dir()):
            lines.append(line)
    lines += [f"127.0.0.1 {' '.join(names)} {MARK} {folder}"] if names else []
    return "\n".join([*lines, ""])


def _check_machine(folder: Path) -> None:
    missing = sorted({package for command, package in PACKAGES.items() if not _which(command)})
    if missing:
        raise SandboxError(
            f"not installed: {', '.join(missing)}; install them with `bash launch/system.sh` "
            f"or `apt-get install {' '.join(missing)}` (Debian, as root)"
        )
    if os.geteuid() != 0:
        raise SandboxError(
            "the sandbox's SLURM runs jobs of any user and adds its nodes to the hosts file: start it as root"
        )
    longest = folder / "munge.socket"
    if len(str(longest)) > MAX_SOCKET_PATH:
        raise SandboxError(f"{longest}: too long for a socket (at most {MAX_SOCKET_PATH} letters); shorten --folder")


def _which(command: str) -> str | None:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATHS}")


def _read_settings(path: Path) -> dict[str, Any]:
    """Return the ports and the password that were chosen when the sandbox was made."""
    return dict(storage.read_json(str(path), _Settings, "settings of a sandbox", remedy=REMEDY, fault=SandboxError))


def _render(template: str, settings: dict[str, Any]) -> str:
    # Configuration files are not HTML: nothing is escaped.
    environment = Environment(loader=PackageLoader("launch.sandbox", "."), undefined=StrictUndefined, autoescape=False)  # noqa: S701
    return environment.get_template(template).render(settings) + "\n"


def _write_secret(path: Path, text: str, mode: int = 0o600) -> None:
    path.touch(mode=mode)
    path.chmod(mode)
    path.write_text(text)


def free_ports(count: int) -> list[int]:
    """Return ports that are free, and that the system gives to no connection before the daemons listen there."""
    first, last = map(int, CONNECTION_PORTS.read_text().split())
    candidates = [port for port in USER_PORTS if not first <= port <= last] or list(USER_PORTS)
    random.shuffle(candidates)
    return list(itertools.islice(filter(_is_free, candidates), count))


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
