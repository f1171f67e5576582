"""How long an iteration of training takes, and in how much memory, beside a plain eager one on the same inputs.

The sides take turns, iteration by iteration, so that what else the machine does meets all of them;
a ratio is the median over turns of ratios within a turn.
"""

import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from avcil_dist.errors import WorldError
from launch.bench.contenders import COPIED, Ran, Setting, SideName, serve

WARM_UP = 2  # turns before those that count
STARTING = 300.0  # seconds that a side may take for an iteration, its start included


class _Contender:
    """A side in a process of its own."""

    def __init__(self, name: SideName, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(name, setting, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, word: str) -> Ran:
        """One iteration. Raises WorldError when the process is gone."""
        try:
            self._connection.send(word)
            answer: Ran = self._connection.recv()
        except (EOFError, OSError):
            self._process.join()
            raise WorldError(
                f"bench step: the process of side {self.name!r} ended with exit code {self._process.exitcode}; "
                "if it was killed, take fewer clips: --current, --replay"
            ) from None
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._connection.send(None)
        self._process.join()


@contextmanager
def _contenders(names: Sequence[SideName], setting: Setting) -> Iterator[list[_Contender]]:
    with ExitStack() as stack:
        made = []
        for name in names:
            contender = _Contender(name, setting)
            stack.callback(contender.close)
            made.append(contender)
        yield made


def measure(setting: Setting, turns: int) -> dict[str, Any]:
    """All that the table shows, as plain JSON values; seconds, bytes, FLOP."""
    names: list[SideName] = ["eager", "ours", "logits given", "ceiling"]
    ran: dict[SideName, list[Ran]] = {name: [] for name in names}
    peaks: dict[str, Ran] = {}
    with _contenders(names, setting) as contenders:
        for turn in track(range(WARM_UP + turns), "turns", console=Console(stderr=True), transient=True):
            for contender in contenders:
                answer = contender.run("time")
                ran[contender.name] += [answer] if turn >= WARM_UP else []
                peaks.setdefault(f"first {contender.name}", answer)
        whole = {contender.name: ran[contender.name][-1].peak for contender in contenders}
        for contender in contenders:
            peaks[contender.name] = contender.run("memory")
    ceilings = _ceilings(ran.pop("ceiling"), setting)
    sides: dict[str, dict[str, Any]] = {}
    for name, answers in ran.items():
        sides[name] = {
            "seconds": statistics.median(answer.seconds for answer in answers),
            "best_seconds": min(answer.seconds for answer in answers),
            "seconds_by_part": _medians([answer.parts for answer in answers]),
            "peak_bytes": whole[name],
            "peak_bytes_by_part": peaks[name].parts,
            "first_loss": peaks[f"first {name}"].loss,
        } | _rates(setting, name, answers, ceilings)
        if "eager" in ran:
            sides[name] |= {
                "eager_time_ratio": statistics.median(
                    eager.seconds / own.seconds for eager, own in zip(ran["eager"], answers, strict=True)
                ),
                "eager_memory_ratio": whole["eager"] / max(1.0, whole[name]),
            }
    return {"setting": asdict(setting), "turns": turns, "ceilings": ceilings, "sides": sides}


def _ceilings(answers: list[Ran], setting: Setting) -> dict[str, float]:
    """The best of the turns: matrix products in FLOP/s, a copy in bytes/s, read and written."""
    best = {name: min(answer.parts[name] for answer in answers) for name in answers[0].parts}
    return {name: (2 * COPIED if name == "copy" else setting.product_flop) / seconds for name, seconds in best.items()}


def _rates(setting: Setting, name: SideName, answers: list[Ran], ceilings: dict[str, float]) -> dict[str, float]:
    """What the definition needs of products and of tokens, per second of the median iteration."""
    with_teacher = name != "logits given"
    seconds = statistics.median(answer.seconds for answer in answers)
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


def show(found: dict[str, Any], console: Console) -> None:
    """One table a question: whole iterations, their parts, what the machine can do."""
    setting, sides = found["setting"], found["sides"]
    shape = "{current} + {replay} clips of ({frames}·{positions}, {dim})".format_map(setting)
    table = Table(title=f"one iteration, {shape}, " + "{precision}, {device}, threads: {threads}".format_map(setting))
    for column in ("", "ms", "best ms", "eager / it", "peak MB", "eager / it", "TFLOP/s", "of matmul", "GB/s", "loss"):
        table.add_column(column, justify="left" if not column else "right")
    for name, side in sides.items():
        table.add_row(
            name,
            f"{side['seconds'] * 1e3:.0f}",
            f"{side['best_seconds'] * 1e3:.0f}",
            f"{side['eager_time_ratio']:.2f}" if "eager_time_ratio" in side else "-",
            f"{side['peak_bytes'] / 1e6:.0f}",
            f"{side['eager_memory_ratio']:.2f}" if "eager_memory_ratio" in side else "-",
            f"{side['flop_per_second'] / 1e12:.3f}",
            f"{side['share_of_matmul']:.0%}",
            f"{side['token_bytes_per_second'] / 1e9:.2f}",
            f"{side['first_loss']:.4f}",
        )
    console.print(table)
    parts = Table(title="ms and peak MB beyond the inputs, by part")
    names = list(dict.fromkeys(name for side in sides.values() for name in side["seconds_by_part"]))
    for column in ("", *sides):
        parts.add_column(column, justify="left" if not column else "right")
    for name in names:
        cells = []
        for side in sides.values():
            seconds, peak = side["seconds_by_part"].get(name), side["peak_bytes_by_part"].get(name)
            cells.append("-" if seconds is None else f"{seconds * 1e3:.0f}  {(peak or 0) / 1e6:.0f}")
        parts.add_row(name, *cells)
    console.print(parts)
    for name, rate in found["ceilings"].items():
        unit = "GB/s, read and written" if name == "copy" else "TFLOP/s"
        console.print(f"{name}: {rate / (1e9 if name == 'copy' else 1e12):.3g} {unit}", highlight=False)
    if "eager" not in sides:
        console.print("no comparison: the eager iteration is part of the project's tests, which are not installed here")
