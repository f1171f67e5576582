"""Probes of a diagnosis: each collects the facts of one finding within a time limit, and changes nothing."""

import email.utils
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.errors import AvcilError
from data_shards.downloads.disk import free_bytes
from launch.doctor import findings
from launch.doctor.findings import Finding

SECONDS, IMPORT_SECONDS = 20.0, 180.0
ANSWER_SECONDS = 8.0  # of a server
HOLD_LOCK = "import fcntl,sys; f=open(sys.argv[1],'r+'); fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)"


@dataclass(frozen=True)
class Answer:
    """Answer of a server: an error, or the skew of this machine's clock in seconds, positive where it is behind."""

    error: str | None
    skew: float | None = None


def diagnose(config: Config | None, output: str, environment: Mapping[str, str]) -> list[Finding]:
    """Return the findings about this machine, the servers that are configured, and the folder of the output."""
    servers = _servers(config, output, environment)
    answers = {name: ask(url) for name, url, _ in servers}
    found = [
        *within("GPUs", IMPORT_SECONDS, _gpus),
        *within("compiler", SECONDS, _compiler),
        *within("DeepSpeed", IMPORT_SECONDS, _deepspeed),
        *within("codecs", SECONDS, _codecs),
        *within("flock", SECONDS, lambda: [_locks(output)]),
        *within("disk", SECONDS, lambda: _places(output)),
        *(findings.reachable(name, url, answers[name].error, remedy) for name, url, remedy in servers),
        *within("storage", 2 * SECONDS, lambda: _storages(config)),
    ]
    skews = [(url, answers[name].skew) for name, url, _ in servers if answers[name].skew is not None]
    return [*found, findings.clock(*(skews[0] if skews else ("", None)))]


def within(subject: str, seconds: float, probe: Callable[[], list[Finding]]) -> list[Finding]:
    """Return the findings of a probe; a fault where it does not end in time, or with an error of the system."""
    results: list[list[Finding]] = []

    def run() -> None:
        try:
            results.append(probe())
        except (AvcilError, OSError, subprocess.TimeoutExpired) as error:
            results.append([Finding(subject, "fault", " ".join(str(error).split()), "correct what it names")])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else [findings.no_answer(subject, seconds)]


def ask(url: str) -> Answer:
    """Return the answer of a server of http or https: any status counts, it is there."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 - of the user's own settings
    started = time.time()
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:  # noqa: S310
            date = response.headers.get("Date")
    except urllib.error.HTTPError as error:
        date = error.headers.get("Date")
        error.close()
    except (OSError, ValueError) as error:
        return Answer(" ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__)
    sent = email.utils.parsedate_to_datetime(date).timestamp() if date else None
    return Answer(None, None if sent is None else sent + 0.5 - (started + time.time()) / 2)


def _servers(config: Config | None, output: str, environment: Mapping[str, str]) -> list[tuple[str, str, str]]:
    """The servers that are configured: name, url, and what to do where one does not answer."""
    servers = []
    hub = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    if environment.get("HF_HUB_OFFLINE", "").upper() not in ("1", "ON", "YES", "TRUE"):
        remedy = "needed by `avcil weights get` and `data get` alone: set HF_ENDPOINT to a mirror, or HF_HUB_OFFLINE=1"
        servers.append((findings.HUB, hub, remedy))
    tracking = (config.tracking.uri if config else None) or environment.get("MLFLOW_TRACKING_URI", "")
    if tracking.startswith(("http://", "https://")):
        servers.append(("MLflow", tracking, "start the server, or correct tracking.uri or MLFLOW_TRACKING_URI"))
    s3 = environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")
    if s3:
        servers.append(("S3", s3, "start it, or correct AWS_ENDPOINT_URL"))
    return servers


def _gpus() -> list[Finding]:
    import torch
    import torch.distributed

    from avcil_dist.training.device import given_gpus, gpu_facts, why_none

    facts = gpu_facts()
    reason = why_none(facts, os.environ) if not facts.count and given_gpus(facts, os.environ) else None
    names = [torch.cuda.get_device_name(number) for number in range(facts.count)]
    version = None
    if torch.distributed.is_nccl_available() and facts.count:
        version = ".".join(map(str, torch.cuda.nccl.version()))
    return [
        findings.gpus(facts.count, names, facts.built_for, facts.driver, reason),
        findings.nccl(version, bool(facts.count)),
    ]


def _compiler() -> list[Finding]:
    path = next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "c++", "g++", "clang++"))), None)
    if path is None:
        return [findings.compiler(None, None)]
    with storage.temporary_folder() as folder:
        source = folder / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [path, "-std=c++17", "-fopenmp", str(source), "-o", str(folder / "probe")]
        made = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    lines = made.stderr.strip().splitlines()
    return [findings.compiler(path, (lines[-1] if lines else "it fails") if made.returncode else None)]


def _deepspeed() -> list[Finding]:
    code = "import logging; logging.disable(50); import deepspeed; print(deepspeed.__version__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines() or ["no output"]
    return [findings.imports("DeepSpeed", *((lines[-1], None) if ran.returncode == 0 else (None, lines[-1])))]


def _codecs() -> list[Finding]:
    import av

    missing = []
    for name, mode in (*findings.CODECS, *findings.MORE_CODECS):
        try:
            av.codec.Codec(name, mode)
        except (av.FFmpegError, ValueError):
            missing.append((name, mode))
    return [findings.codecs(missing)]


def _locks(output: str) -> Finding:
    """Try to lock a file twice: here, and in another process, which must not succeed."""
    path = storage.local_path(output)
    if path is None:
        return Finding("flock", "note", f"{output}: object storage has no locks; one process writes a stream")
    folder = Path(path)
    while not folder.is_dir():
        folder = folder.parent
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".avcil-doctor-") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            command = [sys.executable, "-c", HOLD_LOCK, file.name]
            second = subprocess.run(command, capture_output=True, timeout=SECONDS)
    except OSError as error:
        return findings.locks(str(folder), None, error.strerror or str(error))
    return findings.locks(str(folder), b"BlockingIOError" in second.stderr, None)


def _places(output: str) -> list[Finding]:
    path = storage.local_path(output)
    shared, temporary = Path(os.sep, "dev", "shm"), Path(tempfile.gettempdir())
    more = "docker run --shm-size=8g; decoding processes and clip caches use it"
    found = [findings.room("TMPDIR", str(temporary), free_bytes(temporary), findings.MIN_TEMPORARY, "set TMPDIR")]
    if shared.is_dir():
        found.append(findings.room("shared", str(shared), free_bytes(shared), findings.MIN_SHARED, more))
    if path is not None:
        free = free_bytes(Path(path))
        found.append(findings.room("output", path, free, findings.MIN_DISK, "make room, or name another output="))
    return found


def _storages(config: Config | None) -> list[Finding]:
    """Look up the data and the output of a configuration where they are on object storage."""
    found = []
    for subject, url in (("data", config.data.manifest), ("output", config.output)) if config else ():
        if not storage.is_remote(url):
            continue
        try:
            is_there = storage.exists(url)
        except AvcilError as error:
            setting = "data.manifest" if subject == "data" else subject
            remedy = f"correct {setting}, or the address and the credentials of its storage"
            found.append(Finding(subject, "fault", str(error), remedy))
            continue
        fact = f"{url}: {'there' if is_there else 'reachable, nothing there yet'}"
        if is_there or subject == "output":
            found.append(Finding(subject, "ok", fact))
        else:
            found.append(Finding(subject, "fault", fact, "build the data, or correct data.manifest"))
    return found
