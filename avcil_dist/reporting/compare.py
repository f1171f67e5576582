"""Comparison of streams: those that differ only in seed or class order form one row, with mean and deviation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from avcil_dist.config.compat import result_settings
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.reporting.report import StreamReport, megabytes, percent
from avcil_dist.reporting.tables import WordTable
from avcil_dist.streams.metrics import StreamMetrics

# Settings that have a column of their own and are left out of the variant.
ORDER = "scenario.shuffle_seed"
OWN_COLUMNS = ("name", "seed", "method.name", ORDER)
COLUMNS: dict[str, Callable[[StreamMetrics], float | None]] = {
    "mean accuracy": lambda metrics: metrics.mean_accuracy,
    "final accuracy": lambda metrics: metrics.seen_accuracy[-1],
    "average forgetting": lambda metrics: metrics.average_forgetting,
    "source-disjoint\nmean accuracy": lambda metrics: (
        metrics.source_disjoint.mean_accuracy if metrics.source_disjoint else None
    ),
}


@dataclass(frozen=True)
class Row:
    """Streams of one configuration, one per seed and class order.

    `variant`: the settings that differ within its method.
    """

    variant: str
    streams: tuple[StreamReport, ...]


def group_by_config(streams: Sequence[StreamReport]) -> list[Row]:
    """Group streams whose settings differ only in seed or class order, in order of first appearance."""
    groups: dict[tuple[tuple[str, str], ...], list[StreamReport]] = {}
    for stream in streams:
        settings = tuple(
            (key, str(value)) for key, value in _settings(stream.config).items() if key not in ("seed", ORDER)
        )
        groups.setdefault(settings, []).append(stream)
    return [Row(_variant(group[0], streams), tuple(group)) for group in groups.values()]


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """Print the rows as a table. Numbers are %: `mean ± standard deviation` for several seeds or class orders."""
    table = WordTable("Streams (accuracy on test clips, %)", num_keys=3)
    for heading in ("benchmark", "method", "variant"):
        table.add_column(heading, overflow="fold")
    shown = [name for name in COLUMNS if any(COLUMNS[name](s.metrics) is not None for row in rows for s in row.streams)]
    has_orders = any(_order(stream) is not None for row in rows for stream in row.streams)
    for heading in ("seeds", *(["class orders"] if has_orders else []), "steps", *shown, "memory, MB"):
        table.add_column(heading, justify="right")
    for row in rows:
        config = row.streams[0].config
        table.add_row(
            _benchmark(config),
            config.method.name,
            row.variant,
            _listed(stream.config.seed for stream in row.streams),
            *([_listed(map(_order, row.streams))] if has_orders else []),
            _listed(stream.progress for stream in row.streams),
            *(spread([COLUMNS[name](stream.metrics) for stream in row.streams]) for name in shown),
            _listed(megabytes(stream.metrics.memory) for stream in row.streams),
        )
    console.print(table)


def spread(fractions: Sequence[float | None]) -> str:
    """Format the mean of fractions as %, with the sample standard deviation where there are several."""
    values = [value for value in fractions if value is not None]
    if len(values) < 2:
        return percent(values[0] if values else None)
    return f"{percent(float(np.mean(values)))} ± {percent(float(np.std(values, ddof=1)))}"


def _settings(config: Config) -> dict[str, Any]:
    """The settings that determine the results of a stream."""
    return result_settings(flatten(config)) | {"name": _benchmark(config)}


def _benchmark(config: Config) -> str:
    """The name of the configuration, without that of its class order in a sweep."""
    return config.name.removesuffix(f"-order{config.scenario.shuffle_seed}")


def _order(stream: StreamReport) -> int | None:
    """The seed of the class order; None for the order of the lists."""
    return stream.config.scenario.shuffle_seed


def _listed(values: Iterable[object]) -> str:
    """Different values, in order of first appearance."""
    return ", ".join(dict.fromkeys("–" if value is None else str(value) for value in values))


def _variant(stream: StreamReport, streams: Sequence[StreamReport]) -> str:
    """The settings of a stream that differ among the streams of its method."""
    own = _settings(stream.config)
    peers = [_settings(other.config) for other in streams if other.config.method.name == stream.config.method.name]
    return ", ".join(
        f"{key.removeprefix('method.')}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in own.items()
        if key not in OWN_COLUMNS and any(other.get(key) != value for other in peers)
    )
