"""Time and memory of one training iteration, beside a plain eager one on the same inputs.

The contenders take turns, iteration by iteration, so that other load on the machine affects all of them. A ratio is
the median over turns of the ratios within a turn.
"""

import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any, Literal

from rich.console import Console
from rich.progress import track

from avcil_dist.errors import WorldError
from avcil_dist.reporting.tables import WordTable
from launch.bench.contenders import COPY_BYTES, BenchSetting, ContenderName, Measurement, serve
from launch.console import progress_console

WARM_UP = 2  # turns that are not counted


class _Contender:
    """Contender in its own process."""

    def __init__(self, name: ContenderName, setting: BenchSetting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection: Connection
        self._connection, remote = context.Pipe()
        self._process = context.Process(target=serve, args=(name, setting, remote), daemon=True)
        self._process.start()
        remote.close()

    def run(self, request: Literal["time", "memory"]) -> Measurement:
        """Run one iteration. Raises WorldError if the process has ended."""
        try:
            self._connection.send(request)
            measurement: Measurement = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorldError(
                f"bench step: the process of {self.name!r} ended with exit code {self._process.exitcode}; "
                "if it was killed for memory, reduce --current and --replay"
            ) from None
        return measurement

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join()


@contextmanager
def _contenders(names: Sequence[ContenderName], setting: BenchSetting) -> Iterator[list[_Contender]]:
    with ExitStack() as stack:
        contenders = []
        for name in names:
            contender = _Contender(name, setting)
            stack.callback(contender.close)
            contenders.append(contender)
        yield contenders


def measure(setting: BenchSetting, turns: int) -> dict[str, Any]:
    """Measure all contenders; return JSON values in seconds, bytes and FLOP."""
    names: list[ContenderName] = ["eager", "ours", "ours, teacher cached", "ceiling"]
    timed: dict[ContenderName, list[Measurement]] = {name: [] for name in names}
    peaks: dict[str, Measurement] = {}
    with _contenders(names, setting) as contenders:
        for turn in track(range(WARM_UP + turns), "turns", console=progress_console(), transient=True):
            for contender in contenders:
                measurement = contender.run("time")
                timed[contender.name] += [measurement] if turn >= WARM_UP else []
                peaks.setdefault(f"first {contender.name}", measurement)
        whole = {contender.name: timed[contender.name][-1].peak for contender in contenders}
        for contender in contenders:
            peaks[contender.name] = contender.run("memory")
    ceilings = _ceilings(timed.pop("ceiling"), setting)
    results: dict[str, dict[str, Any]] = {}
    for name, measurements in timed.items():
        results[name] = {
            "seconds": statistics.median(measurement.seconds for measurement in measurements),
            "best_seconds": min(measurement.seconds for measurement in measurements),
            "seconds_by_part": _medians([measurement.parts for measurement in measurements]),
            "peak_bytes": whole[name],
            "peak_bytes_by_part": peaks[name].parts,
            "first_loss": peaks[f"first {name}"].loss,
        } | _rates(setting, name, measurements, ceilings)
        if "eager" in timed:
            results[name] |= {
                "eager_time_ratio": statistics.median(
                    eager.seconds / own.seconds for eager, own in zip(timed["eager"], measurements, strict=True)
                ),
                "eager_memory_ratio": whole["eager"] / max(1.0, whole[name]),
            }
    return {"setting": asdict(setting), "turns": turns, "ceilings": ceilings, "contenders": results}


def _ceilings(measurements: list[Measurement], setting: BenchSetting) -> dict[str, float]:
    """Return the best of the turns: matrix products in FLOP/s, a copy in bytes/s, read plus written."""
    best = {name: min(measurement.parts[name] for measurement in measurements) for name in measurements[0].parts}
    return {
        name: (2 * COPY_BYTES if name == "copy" else setting.product_flop) / seconds for name, seconds in best.items()
    }


def _rates(
    setting: BenchSetting, name: ContenderName, measurements: list[Measurement], ceilings: dict[str, float]
) -> dict[str, float]:
    """Return the FLOP and token bytes of the definition per second of the median iteration."""
    with_teacher = name != "ours, teacher cached"
    seconds = statistics.median(measurement.seconds for measurement in measurements)
    precision = "float32" if name == "eager" else setting.precision
    flops = setting.flop(with_teacher=with_teacher) / seconds
    rate = setting.token_bytes(with_teacher=with_teacher) / seconds
    return {
        "flop_per_second": flops,
        "share_of_matmul": flops / ceilings[f"matmul {precision}"],
        "token_bytes_per_second": rate,
        "share_of_copy": rate / ceilings["copy"],
    }


def _medians(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(part[name] for part in parts if name in part) for name in parts[-1]}


def show(figures: dict[str, Any], console: Console) -> None:
    """Print tables of whole iterations and of their parts, and the ceilings of the machine."""
    setting, contenders = figures["setting"], figures["contenders"]
    shape = "{current} + {replay} clips of ({frames}·{positions}, {dim})".format_map(setting)
    table = WordTable(f"one iteration, {shape}, " + "{precision}, {device}, threads: {threads}".format_map(setting))
    for column in ("", "ms", "best ms", "eager / it", "peak MB", "eager / it", "TFLOP/s", "of matmul", "GB/s", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    for name, contender in contenders.items():
        table.add_row(
            name,
            f"{contender['seconds'] * 1e3:.0f}",
            f"{contender['best_seconds'] * 1e3:.0f}",
            f"{contender['eager_time_ratio']:.2f}" if "eager_time_ratio" in contender else "-",
            f"{contender['peak_bytes'] / 1e6:.0f}",
            f"{contender['eager_memory_ratio']:.2f}" if "eager_memory_ratio" in contender else "-",
            f"{contender['flop_per_second'] / 1e12:.3f}",
            f"{contender['share_of_matmul']:.0%}",
            f"{contender['token_bytes_per_second'] / 1e9:.2f}",
            f"{contender['first_loss']:.4f}",
        )
    console.print(table)
    parts = WordTable("ms and peak MB beyond the inputs, by part")
    names = list(dict.fromkeys(name for contender in contenders.values() for name in contender["seconds_by_part"]))
    for column in ("", *contenders):
        parts.add_column(column, justify="left" if not column else "right")
    for name in names:
        cells = []
        for contender in contenders.values():
            seconds, peak = contender["seconds_by_part"].get(name), contender["peak_bytes_by_part"].get(name)
            cells.append("-" if seconds is None else f"{seconds * 1e3:.0f}  {(peak or 0) / 1e6:.0f}")
        parts.add_row(name, *cells)
    console.print(parts)
    for name, rate in figures["ceilings"].items():
        unit = "GB/s, read and written" if name == "copy" else "TFLOP/s"
        console.print(f"{name}: {rate / (1e9 if name == 'copy' else 1e12):.3g} {unit}", highlight=False)
