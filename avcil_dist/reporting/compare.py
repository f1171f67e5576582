"""Comparison of streams: those that differ only in seed or class order form one row, with mean and deviation."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from rich.console import Console

from avcil_dist.config.compat import result_settings
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.config.variant_names import ORDER, benchmark_name
from avcil_dist.reporting.benchmarks import benchmark_notes, benchmarks
from avcil_dist.reporting.formats import Number, TextTable, print_table
from avcil_dist.reporting.published import MetricName, Published
from avcil_dist.reporting.report import TIES_NOTE, StreamReport, megabytes
from avcil_dist.reporting.significance import MIN_PAIRS, PairedTest, holm, paired_test
from avcil_dist.scenario import Scenario
from avcil_dist.streams.metrics import EpochChoice, StreamMetrics

# Settings that have a column of their own and are left out of the variant.
OWN_COLUMNS = ("name", "seed", "method.name", ORDER)
MEAN: MetricName = "mean_accuracy"
UPPER_BOUND = "joint"  # trains on all classes at once
NO_RESULT = "published: no result of these benchmarks, with their steps, clips and exemplars, in published.yaml"


@dataclass(frozen=True)
class Metric:
    """A number of a stream: its heading, a short one, and the name under which papers publish it."""

    heading: str
    short: str
    value: Callable[[StreamMetrics], float | None]
    higher_is_better: bool = True
    published: MetricName | None = None


METRICS = {
    "mean": Metric("mean\naccuracy", "Mean acc.", lambda m: m.mean_accuracy, published=MEAN),
    "final": Metric("final\naccuracy", "Final acc.", lambda m: m.seen_accuracy[-1], published="final_accuracy"),
    "forgetting": Metric(
        "average\nforgetting",
        "Forgetting",
        lambda m: m.average_forgetting,
        higher_is_better=False,
        published="average_forgetting",
    ),
    "disjoint": Metric(
        "source-disjoint\nmean accuracy",
        "Disjoint acc.",
        lambda m: m.source_disjoint.mean_accuracy if m.source_disjoint else None,
    ),
    "bwt": Metric("backward\ntransfer", "BWT", lambda m: m.backward_transfer),
    "task_il": Metric("Task-IL\naccuracy", "Task-IL", lambda m: m.scores.task_il_accuracy if m.scores else None),
    "top5": Metric("top-5\naccuracy", "Top-5", lambda m: m.scores.top5_accuracy if m.scores else None),
    "map": Metric("macro\nmAP", "mAP", lambda m: m.scores.mean_average_precision if m.scores else None),
}
TABLE_METRICS = ("mean", "final", "forgetting", "disjoint")


@dataclass(frozen=True)
class Row:
    """Streams of one configuration, one per seed and class order.

    `variant`: the settings that differ within its benchmark and method.
    """

    benchmark: str
    variant: str
    streams: tuple[StreamReport, ...]

    @property
    def config(self) -> Config:
        """The configuration of the first stream."""
        return self.streams[0].config

    @property
    def mean_accuracies(self) -> dict[tuple[int, tuple[Scenario, str]], float]:
        """Mean accuracy by seed and class order on the same data, of the streams with all steps."""
        return {
            (stream.config.seed, (stream.scenario, stream.manifest_hash)): stream.metrics.mean_accuracy
            for stream in self.streams
            if _has_all_steps(stream)
        }

    @property
    def is_complete(self) -> bool:
        """Whether all streams have all steps."""
        return all(map(_has_all_steps, self.streams))

    @property
    def is_upper_bound(self) -> bool:
        """Whether the method is the upper bound, which is not compared with the others."""
        return self.config.method.name == UPPER_BOUND


def group_by_config(streams: Sequence[StreamReport]) -> list[Row]:
    """Group the streams of a benchmark whose settings differ only in seed or class order, as they first appear."""
    groups: dict[tuple[str, tuple[tuple[str, str], ...]], list[StreamReport]] = {}
    places = list(zip(benchmarks(streams), streams, strict=True))
    for benchmark, stream in places:
        settings = tuple(
            (key, str(value)) for key, value in _settings(stream.config).items() if key not in ("seed", ORDER)
        )
        groups.setdefault((benchmark, settings), []).append(stream)
    return [
        Row(benchmark, _variant(group[0], [stream for other, stream in places if other == benchmark]), tuple(group))
        for (benchmark, _), group in groups.items()
    ]


def metric_numbers(row: Row, name: str) -> Number:
    """Return one of METRICS over the streams of a row."""
    return Number.of([METRICS[name].value(stream.metrics) for stream in row.streams])


def compared(
    rows: Sequence[Row],
    metrics: Sequence[str] = TABLE_METRICS,
    *,
    significance: bool = False,
    published: Published | None = None,
) -> TextTable:
    """Return the rows as a table. Numbers are %: mean and sample standard deviation over seeds and class orders.

    `metrics` are names of METRICS; those that no stream has are left out.
    `significance` adds the column of `p_against_best`, `published` the result of a paper and the difference. Only
    streams with all steps are compared so.
    """
    shown = [name for name in metrics if any(metric_numbers(row, name).count for row in rows)]
    has_orders = any(_order(stream) is not None for row in rows for stream in row.streams)
    epochs = [_selected_epochs(row.streams) for row in rows]
    table = TextTable("Streams (accuracy on test clips, %)", ["benchmark", "method", "variant"], [])
    table.headings += [
        "seeds",
        *(["class orders"] if has_orders else []),
        "steps",
        *(METRICS[name].heading for name in shown),
    ]
    table.headings += ["memory, MB"]
    table.headings += ["selected epoch\nof each step"] if any(epochs) else []
    for row, selected in zip(rows, epochs, strict=True):
        table.rows.append(
            [
                row.benchmark,
                row.config.method.name,
                row.variant,
                _listed(stream.config.seed for stream in row.streams),
                *([_listed(map(_order, row.streams))] if has_orders else []),
                _listed(stream.progress for stream in row.streams),
                *(metric_numbers(row, name) for name in shown),
                _listed(megabytes(stream.metrics.memory) for stream in row.streams),
                *([selected or "–"] if any(epochs) else []),
            ]
        )
    table.notes += notes_on_benchmarks(rows)
    if any("*" in selected for selected in epochs):
        table.notes.append(TIES_NOTE)
    if significance:
        p_values, note = p_against_best(rows)
        if p_values:
            table.add_column("p against the best", p_values)
        table.notes.append(note)
    if published:
        _add_published(table, rows, published)
    return table


def print_comparison(rows: Sequence[Row], console: Console) -> None:
    """Print the rows as a table. Numbers are %: `mean ± standard deviation` for several seeds or class orders."""
    print_table(compared(rows), console)


def spread(fractions: Sequence[float | None]) -> str:
    """Format the mean of fractions as %, with the sample standard deviation where there are several."""
    return Number.of(fractions).text(" ± ")


def notes_on_benchmarks(rows: Sequence[Row]) -> list[str]:
    """Return a line for each name whose streams are not all compared, or whose data differ by seed."""
    return benchmark_notes([stream for row in rows for stream in row.streams])


def contenders(rows: Sequence[Row], benchmark: str) -> list[Row]:
    """Return the rows of a benchmark that the best one is chosen from: with all steps, and not the upper bound.

    There are none where they have no data in common.
    """
    own = [row for row in rows if row.benchmark == benchmark and row.is_complete and not row.is_upper_bound]
    data = [{stream.manifest_hash for stream in row.streams} for row in own]
    return own if data and set.intersection(*data) else []


def p_against_best(rows: Sequence[Row]) -> tuple[list[str], str]:
    """Return the p of each row against the best of the `contenders` of its benchmark, and a note on the test.

    The best row has the word `best`, the upper bound no p. Nothing but the note is returned where no row has a p.
    """
    shown = ["–"] * len(rows)
    made: list[PairedTest] = []
    for benchmark in dict.fromkeys(row.benchmark for row in rows):
        candidates = contenders(rows, benchmark)
        if len(candidates) < 2:  # one alone is not the best of anything
            continue
        best = max(candidates, key=lambda row: metric_numbers(row, "mean").mean or 0.0)
        others: list[tuple[int, PairedTest]] = []
        for number, row in enumerate(rows):
            if row is best:
                shown[number] = "best"
            elif row.benchmark == benchmark and not row.is_upper_bound:
                others.append((number, paired_test(row.mean_accuracies, best.mean_accuracies)))
        for (number, test), p in zip(others, holm([test.p_value for _, test in others]), strict=True):
            shown[number] = f"{p:.3f}" if p is not None else _without_p(test)
        made += [test for _, test in others]
    same = "; rows that are the same for every seed (same) have one result" * any(test.seeds_agree for test in made)
    bound = f"; {UPPER_BOUND}, the upper bound, is not compared" * any(row.is_upper_bound for row in rows)
    if not made:
        return [], f"no p: no benchmark has two rows with all steps beside {UPPER_BOUND}"
    if all(test.p_value is None for test in made):
        return [], (
            f"no p against the best row of a benchmark: the paired test needs {MIN_PAIRS} common seeds with all steps, "
            f"and there are at most {max(test.pairs for test in made)}{same}"
        )
    return shown, (
        "p: two-sided paired t-test of the mean accuracies of equal seed and class order against the best row of the "
        f"benchmark, corrected for the number of rows (Holm); it needs {MIN_PAIRS} common seeds{same}{bound}"
    )


def _without_p(test: PairedTest) -> str:
    return "– (same)" if test.seeds_agree else f"– ({test.pairs} seed{'s' * (test.pairs != 1)})"


def _add_published(table: TextTable, rows: Sequence[Row], published: Published) -> None:
    """Add the columns of papers, of their results and of the difference, and the sources as notes."""
    results = [published.match(row.config, MEAN) for row in rows]
    used = [result for result in results if result]
    if used:
        table.add_column("paper", [published.papers[result.paper].name if result else "" for result in results])
        values = [result.value / 100 if result else None for result in results]
        table.add_column("published\nmean accuracy", [Number.of([value], ".2f") for value in values])
        table.add_column(
            "difference",
            [
                Number.of([] if value is None else [own - value for own in row.mean_accuracies.values()], "+.1f")
                for row, value in zip(rows, values, strict=True)
            ],
        )
    table.notes += published.sources(used) or [NO_RESULT]


def _has_all_steps(stream: StreamReport) -> bool:
    return stream.metrics.step + 1 == stream.scenario.num_steps


def _settings(config: Config) -> dict[str, Any]:
    """The settings that determine the results of a stream."""
    return result_settings(flatten(config)) | {"name": benchmark_name(config)}


def _order(stream: StreamReport) -> int | None:
    """The seed of the class order; None for the order of the lists."""
    return stream.config.scenario.shuffle_seed


def _selected_epochs(streams: Sequence[StreamReport]) -> str:
    """The epochs, counted from 1, whose weights the steps committed, such as `12–30  7*`: a range over the streams.

    `*` marks a step in which later epochs were as good; – one without training. Empty where no step trained.
    """
    by_step = list(zip_longest(*(stream.metrics.choices for stream in streams)))
    trained = [[choice for choice in step if choice and choice.num_epochs] for step in by_step]
    return "  ".join(map(_range, trained)) if any(trained) else ""


def _range(choices: Sequence[EpochChoice]) -> str:
    if not choices:
        return "–"
    epochs = {choice.epoch + 1 for choice in choices}
    text = str(min(epochs)) if len(epochs) == 1 else f"{min(epochs)}–{max(epochs)}"
    return text + "*" * any(choice.num_ties for choice in choices)


def _listed(values: Iterable[object]) -> str:
    """Different values, in order of first appearance."""
    return ", ".join(dict.fromkeys("–" if value is None else str(value) for value in values))


def _variant(stream: StreamReport, streams: Sequence[StreamReport]) -> str:
    """The settings of a stream that differ among these streams of its benchmark and of its method."""
    own, method = _settings(stream.config), stream.config.method.name
    peers = [_settings(other.config) for other in streams if other.config.method.name == method]
    return ", ".join(
        f"{key.removeprefix('method.')}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in own.items()
        if key not in OWN_COLUMNS and any(other.get(key) != value for other in peers)
    )
