"""Findings of a diagnosis: pure functions of the facts that `probes.py` collects. Each cross states what to do."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from data_shards.downloads.disk import in_words

State = Literal["ok", "note", "fault"]
MARKS: Mapping[State, str] = {"ok": "✓", "note": "–", "fault": "✗"}
MIN_DISK, MIN_TEMPORARY, MIN_SHARED = 5 << 30, 1 << 30, 256 << 20
MAX_SKEW_SECONDS = 60.0  # signatures of S3 and tokens fail a few minutes off
SLOW_BYTES_PER_SECOND = 1e9  # between GPUs of several nodes: what plain Ethernet has
HUB = "hub"
CODECS = (("h264", "r"), ("aac", "r"), ("libx264", "w"), ("aac", "w"))
MORE_CODECS = (("hevc", "r"), ("vp9", "r"), ("av1", "r"), ("opus", "r"), ("mp3", "r"))


@dataclass(frozen=True)
class Finding:
    """One line: subject, state, the fact, and the remedy where it is a fault."""

    subject: str
    state: State
    fact: str
    remedy: str = ""

    def line(self) -> str:
        """Return the line for people."""
        return f"{MARKS[self.state]} {self.subject:<12} {self.fact}{f' → {self.remedy}' if self.remedy else ''}"


def no_answer(subject: str, seconds: float) -> Finding:
    """Return the finding of a probe that exceeded its time limit."""
    return Finding(
        subject, "fault", f"no answer within {seconds:.0f} s", "find out what hangs: a disk, a driver, a proxy"
    )


def gpus(count: int, names: Sequence[str], built_for: str | None, driver: str | None, why_none: str | None) -> Finding:
    """Judge the GPUs. `why_none`: the reason why torch sees none although there are some, else None."""
    versions = f"CUDA {built_for} of torch, driver for CUDA {driver}"
    if count:
        return Finding("GPUs", "ok", f"{count} × {names[0] if names else 'GPU'}; {versions}")
    if why_none is None:
        return Finding("GPUs", "note", "none on this machine; training runs on the processor")
    return Finding("GPUs", "fault", f"torch sees none; {versions}", why_none)


def nccl(version: str | None, has_gpus: bool) -> Finding:
    """Judge NCCL, by which GPUs exchange gradients."""
    if version:
        return Finding("NCCL", "ok", version)
    if not has_gpus:
        return Finding("NCCL", "note", "not there, and not needed without GPUs (gloo is used)")
    return Finding("NCCL", "fault", "this torch has none", "install the CUDA build of torch that setup.py names")


def compiler(path: str | None, error: str | None) -> Finding:
    """Judge the C++ compiler, which makes the attention's kernels for the processor."""
    if path is None:
        return Finding(
            "compiler", "fault", "none ($CXX, c++, g++, clang++)", "install g++; without it plain torch is used"
        )
    if error:
        return Finding("compiler", "fault", f"{path}: {error}", "repair it, or set CXX to another one")
    return Finding("compiler", "ok", path)


def imports(name: str, version: str | None, error: str | None) -> Finding:
    """Judge the import of a package."""
    if version:
        return Finding(name, "ok", version)
    return Finding(name, "fault", f"cannot be imported: {error}", "install avcil-dist again into a fresh environment")


def codecs(missing: Sequence[tuple[str, str]]) -> Finding:
    """Judge the codecs of PyAV, given those that are missing."""
    needed = [f"{name} ({'decoder' if mode == 'r' else 'encoder'})" for name, mode in missing if (name, mode) in CODECS]
    if needed:
        return Finding("codecs", "fault", f"PyAV lacks {', '.join(needed)}", "install PyAV's own wheel: pip install av")
    fewer = ", ".join(name for name, _ in missing)
    return Finding(
        "codecs", "ok", f"H.264 and AAC{f'; without {fewer}' if fewer else '; also HEVC, VP9, AV1, Opus, MP3'}"
    )


def locks(folder: str, works: bool | None, error: str | None) -> Finding:
    """Judge `flock` on the disk of the output: None where it was not tried."""
    if error:
        return Finding("flock", "fault", f"{folder}: {error}", "name a folder that can be written (output=)")
    if works:
        return Finding("flock", "ok", f"works in {folder}")
    return Finding(
        "flock", "fault", f"does not exclude other processes in {folder}", "mount it with flock (Lustre: -o flock)"
    )


def room(subject: str, place: str, free: int, least: int, remedy: str) -> Finding:
    """Judge the free bytes of a place."""
    fact = f"{place}: {in_words(free)} free"
    if free < least:
        return Finding(subject, "fault", f"{fact}, less than {in_words(least)}", remedy)
    return Finding(subject, "ok", fact)


def reachable(subject: str, place: str, error: str | None, remedy: str) -> Finding:
    """Judge a server or a storage. Training needs no hub, so one that does not answer is no fault."""
    if error and subject == HUB:
        return Finding(subject, "note", f"{place}: {error}; {remedy}")
    return Finding(subject, "fault", f"{place}: {error}", remedy) if error else Finding(subject, "ok", place)


def clock(server: str, skew: float | None) -> Finding:
    """Judge the clock of this machine against that of a server, in seconds."""
    if skew is None:
        return Finding("clock", "note", "not compared: no server that answers with its date is configured")
    fact = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} {server}"
    if abs(skew) > MAX_SKEW_SECONDS:
        return Finding("clock", "fault", fact, "set it (chrony, ntpd): signatures and tokens depend on it")
    return Finding("clock", "ok", fact)


def all_reduce(ranks: int, hosts: int, backend: str, rates: Sequence[tuple[int, float]]) -> Finding:
    """Judge a measured all-reduce: (bytes, bytes per second of the bus) by size."""
    if ranks == 1:
        more = "cluster.nodes, cluster.gpus_per_node or cluster.tasks_per_node make more"
        fact = f"one rank starts ({backend}), so nothing is sent; {more}"
        return Finding("all-reduce", "note", fact)
    shown = ", ".join(f"{in_words(size)}: {in_words(int(rate))}/s" for size, rate in rates)
    fact = f"{ranks} ranks on {hosts} node{'s' if hosts > 1 else ''}, {backend}; {shown}"
    fastest = max((rate for _, rate in rates), default=0.0)
    if backend == "nccl" and hosts > 1 and fastest < SLOW_BYTES_PER_SECOND:
        remedy = "the nodes meet over Ethernet: see NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME and NCCL_IB_DISABLE"
        return Finding("all-reduce", "fault", fact, remedy)
    return Finding("all-reduce", "ok", fact)
