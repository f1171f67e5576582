"""All measurements and tests that need a GPU, in one run of minutes: each part in a process with a time limit.

Usage: python -m tests.gpu.on_device [--out FOLDER] [--small] [--seconds N] [--parts NAME,NAME]
Without a GPU the parts run in small, and those that need one are skipped, or run on the processor with
GPU_TESTS_ON_CPU=1. FOLDER gets three files, written as the parts go, so that nothing is lost with a run that is killed:
`on_device.log` has the output of all parts, `on_device.json` the figures, `on_device.txt` the table.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
STOPPING = 20.0  # seconds, in which a part prints what it has
TAIL = 4000  # characters of a failed part's output that are shown
LOG, INTERRUPTED = "on_device.log", "interrupted"
SIDE_BY_SIDE = 6  # streams; each has some processes


@dataclass(frozen=True)
class Part:
    """A command, the seconds that it may take, and whether it needs a GPU. `{json}` is the file for its figures."""

    command: tuple[str, ...]
    limit: float
    needs_gpu: bool = False


def parts_of(*, small: bool) -> dict[str, Part]:
    """Return all parts, the most important first."""

    def measure(name: str) -> tuple[str, ...]:
        return ("-m", "tests.gpu.on_device", "--measure", name, "{json}", *(["--small"] if small else []))

    shape = ["--frames", "2", "--positions", "64", "--dim", "64"] if small else []
    batch = ["--current", "4", "--replay", "2", "--turns", "1"] if small else ["--current", "256", "--replay", "128"]
    clips = ["--clips", "16", "--iterations", "4"] if small else ["--clips", "512", "--iterations", "200"]
    sizes = [8, 4, 8] if small else [256, 128, 512]
    optim = [
        f"optim.{name}={size}"
        for name, size in zip(("global_batch", "global_replay_batch", "global_eval_batch"), sizes, strict=True)
    ]
    step = ("-m", "avcil_dist", "bench", "step", *batch, *shape, "--precision", "bf16", "--json", "{json}")
    stream = (
        "-m",
        "avcil_dist",
        "bench",
        "stream",
        *optim,
        "engine.precision=bf16",
        *clips,
        *shape,
        "--json",
        "{json}",
    )
    run_tests = ("-m", "tests.gpu.run_tests", "{json}")
    kernel_tests = (*run_tests, "--limit", "50", "tests/gpu/test_cuda.py", "tests/gpu/test_fused_attention.py")
    streams = ("--each", "--limit", "200", "--side-by-side", str(SIDE_BY_SIDE), "tests/gpu/test_streams_on_gpu.py")
    return {
        "tests": Part(kernel_tests, 80, needs_gpu=True),
        "streams": Part((*run_tests, *streams), 400, needs_gpu=True),
        "iteration": Part(measure("iteration"), 100),
        "kernels": Part(measure("kernels"), 110),
        "encoders": Part(measure("encoders"), 60),
        "stream": Part(stream, 200),
        "step": Part((*step, *([] if small else ["--turns", "3"])), 80),
    }


def measure_part(name: str, path: Path, *, small: bool) -> None:
    """Measure in this process, into a file."""
    import torch

    from tests.gpu import encoder_times, iteration_times, kernel_times

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    modules = {"kernels": kernel_times, "iteration": iteration_times, "encoders": encoder_times}
    function: Callable[..., dict[str, Any]] = modules[name].measure  # type: ignore[attr-defined]
    path.write_text(json.dumps(function(device, small=small), indent=1))


def run_part(name: str, part: Part, out: Path, limit: float) -> dict[str, Any]:
    """Run a part; return its figures, end and seconds. At its limit, or at an interrupt, it is stopped."""
    started, log = time.monotonic(), out / LOG
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "4")}
    environment["PYTHONFAULTHANDLER"] = "1"
    with tempfile.TemporaryDirectory() as folder, log.open("ab") as output:
        path = Path(folder) / "figures.json"
        command = [sys.executable, *(word.replace("{json}", str(path)) for word in part.command)]
        output.write(f"\n######## {name}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
            _stop(process)
        except KeyboardInterrupt:
            code = INTERRUPTED
            _stop(process)
        figures = json.loads(path.read_text()) if path.exists() else None
    return {
        "ended": "ok" if code == 0 else code,
        "seconds": round(time.monotonic() - started, 1),
        "figures": figures,
        "output": log.read_bytes()[begin:].decode(errors="replace")[-TAIL:] if code != 0 else "",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Interrupt a part, so that it can still print its results; kill its processes after some seconds."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOPPING)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def device_facts() -> dict[str, str]:
    """Return versions and device, from another process, so that this one does not use the GPU."""
    code = (
        "import json, platform, torch, triton; has = torch.cuda.is_available();"
        "print(json.dumps({'device': torch.cuda.get_device_name(0) if has else 'cpu', 'torch': torch.__version__,"
        "'triton': triton.__version__, 'python': platform.python_version()}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    facts: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return facts


def lines_of(figures: Any, depth: int = 0) -> list[str]:
    """Format nested figures as indented lines; a mapping of plain values is one line."""
    if not isinstance(figures, dict):
        return [f"{'  ' * depth}{_shown(figures)}"]
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict) and any(isinstance(inner, dict | list) for inner in value.values()):
            lines += [f"{'  ' * depth}{name}", *lines_of(value, depth + 1)]
        elif isinstance(value, dict):
            lines.append(f"{'  ' * depth}{name:<44} " + "  ".join(f"{k} {_shown(v)}" for k, v in value.items()))
        elif isinstance(value, list) and value and isinstance(value[0], list):
            lines += [f"{'  ' * depth}{name}", *(f"{'  ' * depth}  " + "  ".join(map(_shown, row)) for row in value)]
        else:
            lines.append(f"{'  ' * depth}{name:<44} {_shown(value)}")
    return lines


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    """Run the selected parts; return 0 if all succeeded or were skipped."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("on_device"))
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--parts", default="")
    parser.add_argument("--measure", nargs=2, metavar=("PART", "FILE"))
    given = parser.parse_args()
    if given.measure:
        measure_part(given.measure[0], Path(given.measure[1]), small=given.small)
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / LOG).unlink(missing_ok=True)
    facts = device_facts()
    names = given.parts.split(",") if given.parts else list(parts_of(small=True))
    results = run_parts(names, facts, out, seconds=given.seconds, small=given.small)
    print((out / "on_device.txt").read_text())
    return int(any(result["ended"] != "ok" and "skipped" not in str(result["ended"]) for result in results.values()))


def run_parts(
    names: list[str], facts: dict[str, str], out: Path, *, seconds: float, small: bool
) -> dict[str, dict[str, Any]]:
    """Run parts within so many seconds, and write all results after each of them."""
    started, has_gpu = time.monotonic(), facts["device"] != "cpu"
    parts, results = parts_of(small=small or not has_gpu), dict[str, dict[str, Any]]()
    for name in names:
        left = seconds - (time.monotonic() - started)
        if parts[name].needs_gpu and not has_gpu and not os.environ.get("GPU_TESTS_ON_CPU"):
            result: dict[str, Any] = {"ended": "skipped: needs a GPU", "seconds": 0.0}
        elif left < 15:
            result = {"ended": "skipped: no time is left", "seconds": 0.0}
        else:
            result = run_part(name, parts[name], out, min(parts[name].limit, left))
        results[name] = result
        (out / "on_device.json").write_text(json.dumps({"facts": facts, "parts": results}, indent=1))
        (out / "on_device.txt").write_text("\n".join(table_of(facts, results)) + "\n")
        print(f"== {name}: {result['ended']}, {result['seconds']} s", flush=True)
        if result["ended"] == INTERRUPTED:
            break
    return results


def table_of(facts: dict[str, str], results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the lines of the results: the output of what failed, then all figures, last the end of each part."""
    shown = []
    for name, result in results.items():
        shown += [f"\n== output of {name}", result["output"]] if result.get("output") else []
    shown.append(f"\n{facts}")
    for name, result in results.items():
        shown += [f"\n== {name}", *lines_of(result["figures"])] if result.get("figures") else []
    return [*shown, "", *(f"== {name}: {result['ended']}, {result['seconds']} s" for name, result in results.items())]


if __name__ == "__main__":
    sys.exit(main())
