"""Reports of streams, read from their step artifacts: tables for a terminal, one page for a browser.

Only committed steps count. No tracking server is contacted.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.errors import ArtifactError
from avcil_dist.reporting.tables import WordTable
from avcil_dist.scenario import Scenario
from avcil_dist.streams.metrics import MemoryUse, StreamMetrics
from avcil_dist.streams.summary import committed_steps, load_summary

NUM_COLOURS = 6  # the number of colours in the page's style sheet

# Placeholder colours in the drawings. The page's style sheet replaces them, so that a drawing fits light and dark
# screens.
INK, RULE = "#abc001", "#abc002"
SERIES = [f"#abc1{index:02x}" for index in range(NUM_COLOURS)]
DASHES = ["-", "--", "-.", ":"]
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # in drawings, and as text


@dataclass(frozen=True)
class StreamReport:
    """A stream at its last committed step."""

    folder: str
    config: Config
    scenario: Scenario
    metrics: StreamMetrics

    @property
    def label(self) -> str:
        """Benchmark, method and seed as a title."""
        return f"{self.config.name} · {self.config.method.name} · seed {self.config.seed}"

    @property
    def progress(self) -> str:
        """Committed steps of all steps, such as 2/4."""
        return f"{self.metrics.step + 1}/{self.scenario.num_steps}"

    @property
    def settings(self) -> str:
        """The resolved configuration as YAML."""
        return config_to_yaml(self.config)


def load_streams(folders: Sequence[str]) -> list[StreamReport]:
    """Load the streams in these folders; a folder of stream folders gives all of them, in order of name.

    Raises ArtifactError for a folder without a committed step, and for a damaged or unreadable step.
    """
    streams: dict[str, StreamReport] = {}
    for folder in folders:
        loaded = {
            path: stream
            for path in (folder, *(storage.join(folder, name) for name in storage.list_folder(folder)))
            if (stream := _load_stream(path.rstrip("/"))) is not None
        }
        if not loaded:
            raise ArtifactError(
                f"{folder}: no committed step (searched for step_*/COMMITTED.json there and one folder down); "
                "give the output folder of `avcil train`"
            )
        streams |= loaded
    return list(streams.values())


def print_report(streams: Sequence[StreamReport], console: Console) -> None:
    """Print a summary with a row per stream, then each stream's accuracy matrix. Numbers are %."""
    summary = WordTable("Streams (accuracy on test clips, %)")
    for heading in ("benchmark", "method"):
        summary.add_column(heading)
    for heading in (
        "seed",
        "steps",
        "seen accuracy after each step",
        "mean accuracy",
        "average forgetting",
        "memory, MB",
    ):
        summary.add_column(heading, justify="right")
    for stream in streams:
        metrics = stream.metrics
        summary.add_row(
            stream.config.name,
            stream.config.method.name,
            str(stream.config.seed),
            stream.progress,
            "  ".join(percent(value) for value in metrics.seen_accuracy),
            percent(metrics.mean_accuracy),
            percent(metrics.average_forgetting),
            megabytes(metrics.memory),
        )
    console.print(summary)
    for stream in streams:
        matrix = WordTable(f"{stream.label}: accuracy on each task, %")
        matrix.add_column("after step", justify="right")
        for task, size in enumerate(_task_sizes(stream)):
            matrix.add_column(f"task {task}\n{size} classes", justify="right")
        for step, row in enumerate(stream.metrics.accuracy):
            matrix.add_row(str(step), *(percent(value) for value in row))
        console.print(matrix)


def write_page(streams: Sequence[StreamReport], path: str) -> None:
    """Write the report as one HTML file without scripts or external resources."""
    loader = PackageLoader("avcil_dist", "reporting")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters |= {"percent": percent, "megabytes": megabytes}
    longest = max(stream.scenario.num_steps for stream in streams)
    charts = [("Seen accuracy, %", _chart([_points(s.metrics.seen_accuracy, 0) for s in streams], "seen", longest))]
    if any(stream.metrics.forgetting for stream in streams):
        curves = [_points(stream.metrics.forgetting, 1) for stream in streams]
        charts.append(("Forgetting, percentage points", _chart(curves, "forgetting", longest)))
    page = environment.get_template("report.html.j2").render(
        streams=streams,
        charts=charts,
        task_sizes=[_task_sizes(stream) for stream in streams],
        classes=list(dict.fromkeys(name for stream in streams for name in stream.metrics.per_class)),
        longest=longest,
        num_colours=NUM_COLOURS,
        glyphs=list(MARKERS.values()),
    )
    storage.write_bytes(path, page.encode())


def percent(fraction: float | None) -> str:
    """Format a fraction as % with one decimal, without the sign; None as –."""
    return "–" if fraction is None else f"{100 * fraction + 0.0:.1f}"


def megabytes(memory: MemoryUse | None) -> str:
    """Format the memory of a stream after its last step in MB (10⁶ bytes); – where it was not recorded."""
    return "–" if memory is None else f"{memory.bytes / 1e6:,.1f}"


def _load_stream(folder: str) -> StreamReport | None:
    """Load the stream in `folder` at its last committed step; None where no step is committed."""
    committed = committed_steps(folder)
    if not committed:
        return None
    summary = load_summary(folder, committed[-1])
    return StreamReport(folder, summary.config, summary.scenario, summary.metrics)


def _task_sizes(stream: StreamReport) -> list[int]:
    """The number of classes of each task learnt so far."""
    return [len(stream.scenario.new(task)) for task in range(stream.metrics.step + 1)]


def _points(values: Sequence[float], first: int) -> tuple[list[int], list[float]]:
    """Steps and percentages of a curve that begins at step `first`."""
    return list(range(first, first + len(values))), [100 * value for value in values]


def _chart(curves: Sequence[tuple[list[int], list[float]]], name: str, num_steps: int) -> Markup:
    """Draw curves over steps as an SVG element in the page's colours; `name` prefixes its ids."""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained", facecolor="none")
        axes = figure.subplots(subplot_kw={"facecolor": "none"})
        for index, (steps, values) in enumerate(curves):
            axes.plot(
                steps,
                values,
                color=SERIES[index % NUM_COLOURS],
                linestyle=DASHES[index % len(DASHES)],
                marker=list(MARKERS)[index % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                clip_on=False,
            )
        axes.set_xlim(-0.2, max(num_steps - 0.8, 0.2))
        lowest = min([0.0, *(value for _, values in curves for value in values)])
        axes.set_ylim(bottom=lowest - 3 if lowest else 0, top=100 if name == "seen" else None)
        axes.set_xlabel("step", color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)
        drawing = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # equal streams give equal pages
        FigureCanvasSVG(figure).print_svg(drawing, metadata=no_metadata)
    return _in_page(drawing.getvalue(), name)


def _in_page(svg: str, name: str) -> Markup:
    """Adapt a drawing to the page: unique ids, the page's font and colours, transparent background, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    for index, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    svg = svg.replace(INK, "var(--ink-soft)").replace(RULE, "var(--rule)")
    svg = re.sub(r"<svg ", f'<svg role="img" aria-label="{name} by step" ', svg, count=1)
    return Markup(svg)  # noqa: S704 - drawn by matplotlib from numbers alone
