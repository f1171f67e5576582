"""Methods side by side: streams that differ in their seed alone are one row, with mean and deviation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from avcil_dist.config.compat import result_settings
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.reporting.report import StreamReport, percent
from avcil_dist.streams.metrics import StreamMetrics

# What a stream's row shows of it, beside the columns that it has anyway.
SHOWN = ("name", "seed", "method.name")
COLUMNS: dict[str, Callable[[StreamMetrics], float | None]] = {
    "mean accuracy": lambda metrics: metrics.mean_accuracy,
    "final accuracy": lambda metrics: metrics.seen_accuracy[-1],
    "average forgetting": lambda metrics: metrics.average_forgetting,
    "source-disjoint\nmean accuracy": lambda metrics: (
        float(np.mean(metrics.source_disjoint.seen_accuracy)) if metrics.source_disjoint else None
    ),
}


@dataclass(frozen=True)
class Row:
    """Streams of one configuration: what sets it apart from the others of its method, and one stream a seed."""

    variant: str
    streams: tuple[StreamReport, ...]


def compare(streams: Sequence[StreamReport]) -> list[Row]:
    """The streams in rows, in order of first appearance."""
    groups: dict[tuple[tuple[str, str], ...], list[StreamReport]] = {}
    for stream in streams:
        settings = tuple((key, str(value)) for key, value in _settings(stream.config).items() if key != "seed")
        groups.setdefault(settings, []).append(stream)
    return [Row(_variant(group[0], streams), tuple(group)) for group in groups.values()]


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """Print a table; numbers are %, `mean ± standard deviation` over the seeds where there are several."""
    table = Table(title="Streams (accuracy on test clips, %)", title_justify="left")
    for heading in ("benchmark", "method", "variant"):
        table.add_column(heading, overflow="fold")
    wanted = [
        name for name in COLUMNS if any(COLUMNS[name](s.metrics) is not None for row in rows for s in row.streams)
    ]
    for heading in ("seeds", "steps", *wanted):
        table.add_column(heading, justify="right")
    for row in rows:
        config = row.streams[0].config
        table.add_row(
            escape(config.name),
            config.method.name,
            escape(row.variant),
            ", ".join(str(stream.config.seed) for stream in row.streams),
            ", ".join(dict.fromkeys(stream.progress for stream in row.streams)),
            *(spread([COLUMNS[name](stream.metrics) for stream in row.streams]) for name in wanted),
        )
    console.print(table)


def spread(fractions: Sequence[float | None]) -> str:
    """The mean of fractions as %, and their standard deviation (of a sample) where there are several."""
    known = [value for value in fractions if value is not None]
    if len(known) < 2:
        return percent(known[0] if known else None)
    return f"{percent(float(np.mean(known)))} ± {percent(float(np.std(known, ddof=1)))}"


def _settings(config: Config) -> dict[str, Any]:
    """The settings that determine the results of a stream."""
    return result_settings(flatten(config))


def _variant(stream: StreamReport, streams: Sequence[StreamReport]) -> str:
    """The settings of a stream in which not all streams of its method agree."""
    own = _settings(stream.config)
    peers = [_settings(other.config) for other in streams if other.config.method.name == stream.config.method.name]
    return ", ".join(
        f"{key.removeprefix('method.')}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in own.items()
        if key not in SHOWN and any(other.get(key) != value for other in peers)
    )
