"""Table of a paper in LaTeX (booktabs): methods × benchmarks and metrics, mean ± standard deviation, the best in bold.

Streams of the method `joint`, which trains on all classes at once, follow below a rule as the upper bound, and
published results below another one; neither is in bold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from avcil_dist.reporting.compare import (
    METRICS,
    NO_RESULT,
    Row,
    contenders,
    metric_numbers,
    notes_on_benchmarks,
    p_against_best,
)
from avcil_dist.reporting.formats import Number
from avcil_dist.reporting.published import Published, Result
from avcil_dist.text.visible import visible

DEFAULT_METRICS = ("mean", "forgetting")
ESCAPES = {
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "–": "--",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
}


@dataclass(frozen=True)
class _Column:
    """A metric on a benchmark, or the p of its mean accuracy."""

    benchmark: str
    metric: str | None

    @property
    def heading(self) -> str:
        if self.metric is None:
            return "$p$"
        metric = METRICS[self.metric]
        arrow = r"\uparrow" if metric.higher_is_better else r"\downarrow"
        return f"{metric.short} ${arrow}$"


def latex_table(
    rows: Sequence[Row], metrics: Sequence[str], *, significance: bool = False, published: Published | None = None
) -> str:
    """Return the rows as a tabular; `metrics` are names of METRICS. What each number is stands in comments above it."""
    by_label: dict[str, dict[str, Row]] = {}
    for row in rows:
        label, benchmark = _place(row)
        by_label.setdefault(label, {})[benchmark] = row
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    p_values, note = p_against_best(rows) if significance else ([], None)
    p_of = {_place(row): p for row, p in zip(rows, p_values, strict=False)}
    names: list[str | None] = [*metrics, *([None] if p_values else [])]
    columns = [_Column(benchmark, name) for benchmark in benchmarks for name in names]
    best = {column: _best(rows, column) for column in columns}

    def cells(found: dict[str, Row]) -> Iterator[str]:
        for column in columns:
            row = found.get(column.benchmark)
            if row is None:
                yield "--"
            elif column.metric is None:
                yield _escaped(p_of[_place(row)])
            else:
                yield _cell(metric_numbers(row, column.metric), row, best[column])

    bound = {label: found for label, found in by_label.items() if all(row.is_upper_bound for row in found.values())}
    own = {label: found for label, found in by_label.items() if label not in bound}
    results = _results(rows, metrics, published)
    parts = [
        *([_line([_escaped(label), *cells(found)]) for label, found in part.items()] for part in (own, bound)),
        [_line([_escaped(label), *_published_cells(found, columns)]) for label, found in results.items()],
    ]
    comments = [_what_numbers_are(rows), *notes_on_benchmarks(rows), *([note] if note else [])]
    if published:
        used = [result for found in results.values() for result in found.values()]
        comments += published.sources(used) or [NO_RESULT]
    body = "\n\\midrule\n".join("\n".join(part) for part in parts if part)
    return "\n".join(
        [
            *(f"% {visible(comment)}" for comment in comments),
            rf"\begin{{tabular}}{{l{'c' * len(columns)}}}",
            r"\toprule",
            *_head(benchmarks, columns, len(names)),
            r"\midrule",
            body,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )


def _head(benchmarks: Sequence[str], columns: Sequence[_Column], width: int) -> Iterator[str]:
    """The line of the benchmarks, each above its metrics, and the line of the metrics."""
    yield _line(["", *(rf"\multicolumn{{{width}}}{{c}}{{{_escaped(name)}}}" for name in benchmarks)])
    starts = range(2, 2 + len(columns), width)
    yield " ".join(rf"\cmidrule(lr){{{start}-{start + width - 1}}}" for start in starts)
    yield _line(["Method", *(column.heading for column in columns)])


def _what_numbers_are(rows: Sequence[Row]) -> str:
    counts = sorted({len(row.streams) for row in rows})
    several = "" if counts == [1] else f": mean ± sample standard deviation over {_range(counts)} streams a row"
    missing = "" if all(row.is_complete for row in rows) else "; *: steps are missing, never in bold"
    return f"\\usepackage{{booktabs}}; % on test clips{several}{missing}"


def _range(counts: Sequence[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _label(row: Row) -> str:
    method = row.config.method.name
    return f"{method} ({row.variant})" if row.variant else method


def _place(row: Row) -> tuple[str, str]:
    """The label and the benchmark of a row, which no other row has both of."""
    return _label(row), row.benchmark


def _best(rows: Sequence[Row], column: _Column) -> float | None:
    """The best value as it is shown, of the contenders; None for fewer than two."""
    if column.metric is None:
        return None
    numbers = [metric_numbers(row, column.metric) for row in contenders(rows, column.benchmark)]
    values = [_shown(number.mean) for number in numbers if number.mean is not None]
    if len(values) <= 1:  # one alone is not the best of anything
        return None
    return max(values) if METRICS[column.metric].higher_is_better else min(values)


def _shown(fraction: float) -> float:
    return round(100 * fraction, 1)


def _cell(number: Number, row: Row, best: float | None) -> str:
    if number.mean is None:
        return "--"
    mean, between, deviation = number.text("±").partition("±")
    if best is not None and row.is_complete and not row.is_upper_bound and _shown(number.mean) == best:
        mean = rf"\textbf{{{mean}}}"
    return mean.replace("-", "$-$") + (rf" $\pm$ {deviation}" if between else "") + "$^{*}$" * (not row.is_complete)


def _results(
    rows: Sequence[Row], metrics: Sequence[str], published: Published | None
) -> dict[str, dict[_Column, Result]]:
    """The published results to set below, by label and column."""
    found: dict[str, dict[_Column, Result]] = {}
    for row in rows if published else ():
        assert published is not None
        for name in metrics:
            metric = METRICS[name].published
            result = published.match(row.config, metric) if metric else None
            if result is None:
                continue
            words = [result.method, result.modality if result.modality != "both" else None]
            extra = ", ".join(word for word in words if word)
            label = f"{published.papers[result.paper].name}{f' ({extra})' if extra else ''}, published"
            found.setdefault(label, {})[_Column(row.benchmark, name)] = result
    return found


def _published_cells(results: Mapping[_Column, Result], columns: Sequence[_Column]) -> Iterator[str]:
    for column in columns:
        result = results.get(column)
        yield f"{result.value:.2f}".replace("-", "$-$") if result else "--"


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escaped(text: str) -> str:
    return "".join(ESCAPES.get(letter, letter) for letter in visible(text))
