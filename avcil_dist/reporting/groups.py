"""Groups of streams on the report page: those that differ in seed or class order alone, with means and deviations."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from avcil_dist.config.compat import result_settings
from avcil_dist.config.serialization import flatten
from avcil_dist.reporting.charts import Curve
from avcil_dist.reporting.compare import group_by_config, spread
from avcil_dist.reporting.confusion import ConfusionView, confusion_view
from avcil_dist.reporting.history import StreamHistory, load_history
from avcil_dist.reporting.report import StreamReport
from avcil_dist.streams.metrics import StreamMetrics

PERCENT = 100
NO_VARIANTS = ("seed", "scenario.shuffle_seed")
Series = Sequence[float | None]


@dataclass(frozen=True)
class StreamGroup:
    """Streams of one configuration. `number` selects their colour and mark, `variant` the settings that differ.

    `benchmark` is empty on a page of one benchmark.
    """

    number: int
    benchmark: str
    variant: str
    histories: Sequence[StreamHistory]

    @property
    def streams(self) -> list[StreamReport]:
        """The streams at their last committed steps."""
        return [history.stream for history in self.histories]

    @property
    def first(self) -> StreamReport:
        """The stream that stands for the group where a single one is shown."""
        return self.histories[0].stream

    @property
    def label(self) -> str:
        """Benchmark, method and variant as a title."""
        return " · ".join(word for word in (self.benchmark, self.first.config.method.name, self.variant) if word)

    @property
    def seeds(self) -> str:
        """The seeds, and the seeds of class orders where there are any."""
        seeds = ", ".join(dict.fromkeys(str(stream.config.seed) for stream in self.streams))
        orders = dict.fromkeys(stream.config.scenario.shuffle_seed for stream in self.streams)
        return seeds if set(orders) == {None} else f"{seeds}; orders {', '.join(map(str, orders))}"

    @property
    def longest(self) -> StreamReport:
        """The first stream with the most committed steps."""
        return max(self.streams, key=lambda stream: stream.metrics.step)

    @property
    def mean_accuracy(self) -> str:
        """Mean ± standard deviation over the streams, in %; so are the next two."""
        return spread([stream.metrics.mean_accuracy for stream in self.streams])

    @property
    def final_accuracy(self) -> str:
        """Accuracy on all seen classes after the last committed step."""
        return spread([stream.metrics.seen_accuracy[-1] for stream in self.streams])

    @property
    def average_forgetting(self) -> str:
        """Mean of the forgetting after each step but the first."""
        return spread([stream.metrics.average_forgetting for stream in self.streams])

    @property
    def seen(self) -> list[float]:
        """Mean accuracy on all seen classes after each step."""
        return [float(m) for m in mean_and_deviation([stream.metrics.seen_accuracy for stream in self.streams])[0]]

    @property
    def has_ties(self) -> bool:
        """Whether a selected epoch has later ones that are as good."""
        return any(choice and choice.num_ties for stream in self.streams for choice in stream.metrics.choices)

    def curve(self, value: Callable[[StreamMetrics], Series], first: int = 0) -> Curve | None:
        """The mean of a series of values over steps, in %, with a band of one standard deviation for several streams.

        The series begins at step `first`. None where no stream has a value.
        """
        mean, deviation = mean_and_deviation([value(stream.metrics) for stream in self.streams])
        places = [place for place in range(len(mean)) if np.isfinite(mean[place])]
        if not places:
            return None
        return Curve(
            [first + place for place in places],
            [PERCENT * mean[place] for place in places],
            self.number,
            [PERCENT * deviation[place] for place in places] if len(self.histories) > 1 else None,
        )

    @property
    def matrix(self) -> list[list[tuple[float, float | None]]]:
        """Accuracy matrix: mean and, for several streams, standard deviation of each cell that any stream has."""
        num_steps = max(len(stream.metrics.accuracy) for stream in self.streams)
        rows = []
        for step in range(num_steps):
            cells = [stream.metrics.accuracy[step] for stream in self.streams if step < len(stream.metrics.accuracy)]
            has_several = len(cells) > 1
            mean, deviation = mean_and_deviation(cells)
            rows.append([(float(m), float(d) if has_several else None) for m, d in zip(mean, deviation, strict=True)])
        return rows

    @property
    def confusion(self) -> ConfusionView | None:
        """Mean confusion matrix after the last step."""
        return confusion_view(self.streams)

    def class_curve(self, name: str) -> list[tuple[int, float]]:
        """Each committed step from the first one of a class on, and the mean accuracy of the class after it."""
        values: dict[int, list[float]] = {}
        for history in self.histories:
            for _, metrics in history.steps:
                if name in metrics.per_class:
                    values.setdefault(metrics.step, []).append(metrics.per_class[name])
        return [(step, float(np.mean(values[step]))) for step in sorted(values)]


def make_groups(streams: Sequence[StreamReport]) -> list[StreamGroup]:
    """Group streams by configuration and read their histories. Raises ArtifactError for a damaged step."""
    rows = group_by_config(streams)
    has_several = len({row.benchmark for row in rows}) > 1
    return [
        StreamGroup(
            number,
            row.benchmark if has_several else "",
            row.variant,
            [load_history(stream) for stream in row.streams],
        )
        for number, row in enumerate(rows)
    ]


def mean_and_deviation(series: Sequence[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and sample standard deviation at each position, over the series that have a value there; NaN for none.

    A single value has deviation 0.
    """
    length = max((len(values) for values in series), default=0)
    table = np.full((len(series), length), np.nan)
    for row, values in zip(table, series, strict=True):
        row[: len(values)] = [np.nan if value is None else value for value in values]
    counts = np.isfinite(table).sum(axis=0)
    mean = np.divide(np.nansum(table, axis=0), counts, out=np.full(length, np.nan), where=counts > 0)
    squares = np.nansum((table - mean) ** 2, axis=0)
    return mean, np.sqrt(np.divide(squares, counts - 1, out=np.zeros(length), where=counts > 1))


def differing_settings(groups: Sequence[StreamGroup]) -> dict[str, list[str]]:
    """The settings that change results and are not the same in all groups: by key, a value per group, – for none."""
    settings = [_settings(group.first) for group in groups]
    keys = dict.fromkeys(key for own in settings for key in own if key not in NO_VARIANTS)
    table = {key: [own.get(key, "–") for own in settings] for key in keys}
    return {key: values for key, values in table.items() if len(set(values)) > 1}


def _settings(stream: StreamReport) -> Mapping[str, str]:
    return {key: _shown(value) for key, value in result_settings(flatten(stream.config)).items()}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)
