"""Page of a report: one HTML file with charts, without scripts or external resources."""

import io
import re
from collections.abc import Sequence

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from avcil_dist import storage
from avcil_dist.reporting.report import StreamReport, megabytes, percent, task_sizes

NUM_COLOURS = 6  # the number of colours in the page's style sheet

# Placeholder colours in the drawings. The page's style sheet replaces them, so that a drawing fits light and dark
# screens.
INK, RULE = "#abc001", "#abc002"
SERIES = [f"#abc1{index:02x}" for index in range(NUM_COLOURS)]
DASHES = ["-", "--", "-.", ":"]
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # in drawings, and as text


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
        task_sizes=[task_sizes(stream) for stream in streams],
        classes=list(dict.fromkeys(name for stream in streams for name in stream.metrics.per_class)),
        longest=longest,
        num_colours=NUM_COLOURS,
        glyphs=list(MARKERS.values()),
    )
    storage.write_bytes(path, page.encode())


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
