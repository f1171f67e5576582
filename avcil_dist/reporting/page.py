"""Page of a report: one HTML file with charts, without external resources.

Its script zooms the confusion matrices and opens folded parts for print; without it everything else is shown. A policy
in the page forbids every request.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from avcil_dist import storage
from avcil_dist.reporting.attention import ClipFigure
from avcil_dist.reporting.attention_page import clip_view
from avcil_dist.reporting.charts import MARKERS, NUM_COLOURS, Chart, Curve
from avcil_dist.reporting.groups import PERCENT, StreamGroup, differing_settings, make_groups
from avcil_dist.reporting.history import duration
from avcil_dist.reporting.report import StreamReport, megabytes, percent, task_sizes
from avcil_dist.streams.metrics import EpochMetrics

FOLDED_FROM = 41  # classes from which the tables of classes are folded by task
POINTS_PER_STEP = 200  # of a training curve; more are not distinct in the chart
FRAMES_SHOWN = 4  # of a clip, evenly spread


def write_page(
    streams: Sequence[StreamReport], path: str, clips: Sequence[ClipFigure] = (), links: Mapping[str, str] | None = None
) -> None:
    """Write the report as one HTML file.

    `clips` are shown with their maps of evidence. `links` are the addresses of the streams' runs, by folder. Raises
    ArtifactError for a damaged step.
    """
    groups = make_groups(streams)
    loader = PackageLoader("avcil_dist", "reporting")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "megabytes": megabytes, "duration": duration, "sparkline": sparkline}
    script = environment.get_template("report.js.j2").render()
    page = environment.get_template("report.html.j2").render(
        title=" · ".join(dict.fromkeys(stream.config.name for stream in streams)),
        groups=groups,
        result_charts=_result_charts(groups),
        sound_charts=_sound_charts(groups),
        training=[(group, charts) for group in groups if (charts := _training_charts(group))],
        confusions=[(group, view) for group in groups if (view := group.confusion)],
        task_sizes=task_sizes,
        tasks=_tasks(streams),
        is_folded=len({name for stream in streams for name in stream.metrics.per_class}) >= FOLDED_FROM,
        longest=max(stream.scenario.num_steps for stream in streams),
        settings=differing_settings(groups),
        links=links or {},
        clips=[clip_view(clip, FRAMES_SHOWN) for clip in clips],
        num_colours=NUM_COLOURS,
        glyphs=list(MARKERS.values()),
        script=Markup(script),  # noqa: S704 - a file of this package
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    storage.write_bytes(path, page.encode())


def sparkline(curve: Sequence[tuple[int, float]], num_steps: int) -> str:
    """Path of a curve of (step, value) in a field of 100 × 20: steps from left to right, 0 at the bottom, 1 on top."""
    width = 100 / max(num_steps - 1, 1)
    points = [f"{step * width:.0f} {19 - 18 * value:.0f}" for step, value in curve]
    return f"M{points[0]}h1" if len(points) == 1 else "M" + "L".join(points)


def _tasks(streams: Sequence[StreamReport]) -> list[list[str]]:
    """Classes that any stream has an accuracy of, by the task that they are in first."""
    tasks: list[list[str]] = []
    known: set[str] = set()
    for stream in streams:
        for task in range(stream.metrics.step + 1):
            names = [n for n in stream.scenario.new(task) if n in stream.metrics.per_class and n not in known]
            known.update(names)
            tasks.extend([] for _ in range(task + 1 - len(tasks)))
            tasks[task].extend(names)
    return tasks


def _result_charts(groups: Sequence[StreamGroup]) -> list[Chart]:
    accuracy = [group.curve(lambda metrics: metrics.seen_accuracy) for group in groups]
    forgetting = [group.curve(lambda metrics: metrics.forgetting, first=1) for group in groups]
    return [
        Chart("seen", "Accuracy on all seen classes, %", _present(accuracy), "step", top=100),
        *_chart_of("forgetting", "Forgetting, percentage points", forgetting),
    ]


def _sound_charts(groups: Sequence[StreamGroup]) -> list[Chart]:
    """Shares of attention and evidence on the sounding regions, for data sets where these are known."""
    areas = [shares.area for group in groups for s in group.streams if (shares := s.metrics.regions)]
    if not areas:
        return []
    even = (PERCENT * areas[0], "area of the region")

    def curves(name: str) -> list[Curve | None]:
        return [group.curve(lambda m: m.regions.after(name) if m.regions else ()) for group in groups]

    def first_task(name: str) -> list[Curve | None]:
        return [
            group.curve(lambda m: [row[0] for row in getattr(m.regions, name)] if m.regions else ()) for group in groups
        ]

    return [
        *_chart_of("evidence", "Evidence on the sounding region, all seen classes, %", curves("evidence"), [even]),
        *_chart_of(
            "evidence0", "Evidence on the sounding region, classes of task 0, %", first_task("evidence"), [even]
        ),
        *_chart_of("with", "Clips of task 0 with any evidence for their class, %", first_task("with_evidence")),
        *_chart_of("attention", "Attention on the sounding region, all seen classes, %", curves("attention"), [even]),
    ]


def _chart_of(
    name: str, title: str, curves: Sequence[Curve | None], lines: Sequence[tuple[float, str]] = ()
) -> list[Chart]:
    present = _present(curves)
    return [Chart(name, title, present, "step", lines=lines)] if present else []


def _present(curves: Sequence[Curve | None]) -> list[Curve]:
    return [curve for curve in curves if curve is not None]


def _training_charts(group: StreamGroup) -> list[Chart]:
    """Loss and validation accuracy over all epochs: the first stream with its selected epochs, others thin.

    One step follows the other on the horizontal axis, each one wide.
    """
    losses: list[Curve] = []
    accuracies: list[Curve] = []
    for number, history in enumerate(group.histories):
        for _, metrics in history.steps:
            loss, accuracy = _step_curves(metrics.epochs, metrics.step, metrics.epoch, group.number, faint=number > 0)
            losses += loss
            accuracies += accuracy
    last = max((stream.metrics.step for stream in group.streams), default=0)
    charts = [
        ("val", "Validation accuracy, %", accuracies, 100),
        ("loss", "Training loss", losses, None),
    ]
    return [
        Chart(f"{name}{group.number}", title, curves, "step", top=top, divisions=range(last + 2))
        for name, title, curves, top in charts
        if curves
    ]


def _step_curves(
    epochs: Sequence[EpochMetrics], step: int, chosen: int, series: int, *, faint: bool
) -> tuple[list[Curve], list[Curve]]:
    stride = -(-len(epochs) // POINTS_PER_STEP) if epochs else 1
    shown = [number for number in range(len(epochs)) if number % stride == 0 or number == chosen]

    def curve(points: Sequence[tuple[int, float]]) -> list[Curve]:
        marks = [] if faint else [place for place, (number, _) in enumerate(points) if number == chosen]
        x = [step + (number + 1) / len(epochs) for number, _ in points]
        return [Curve(x, [value for _, value in points], series, None, marks, faint)] if points else []

    return (
        curve([(number, epochs[number].loss) for number in shown]),
        curve([(n, PERCENT * value) for n in shown if (value := epochs[n].val_accuracy) is not None]),
    )
