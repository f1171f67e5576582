"""Charts of the report page: curves with bands as SVG elements in the page's colours."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLOURS = 6  # the number of colours in the page's style sheet

# Placeholder colours in the drawings. The page's style sheet replaces them, so that a drawing fits light and dark
# screens and paper.
INK, RULE = "#abc001", "#abc002"
SERIES = [f"#abc1{index:02x}" for index in range(NUM_COLOURS)]
DASHES = ["-", "--", "-.", ":"]
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚"}  # in drawings, and as text
MAX_MARKED = 20  # points of a curve that are marked one by one


@dataclass(frozen=True)
class Curve:
    """Points of a curve; `deviation` is half the height of its band, None for no band.

    `series` selects colour, dash and marker. `chosen` are positions of points that are marked. A `faint` curve is thin,
    for the seeds behind a mean.
    """

    x: Sequence[float]
    y: Sequence[float]
    series: int
    deviation: Sequence[float] | None = None
    chosen: Sequence[int] = ()
    faint: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves with a title. `name` is unique in the page and begins the ids of its drawing.

    `bottom` and `top` bound the vertical axis, by default by the data. `lines` are horizontal ones with a label,
    `divisions` positions of vertical ones.
    """

    name: str
    title: str
    curves: Sequence[Curve]
    x_label: str
    bottom: float | None = 0
    top: float | None = None
    lines: Sequence[tuple[float, str]] = ()
    divisions: Sequence[float] = ()

    @property
    def svg(self) -> Markup:
        """The drawing as an SVG element that takes the page's colours and any width."""
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name, "font.size": 10}):
            figure = Figure(figsize=(5.2, 3.2), layout="constrained", facecolor="none")
            axes = figure.subplots(subplot_kw={"facecolor": "none"})
            for curve in self.curves:
                _draw(axes, curve)
            self._draw_axes(axes)
            canvas = FigureCanvasSVG(figure)
            output = io.StringIO()
            canvas.print_svg(output, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        return _in_page(output.getvalue(), self.name, self.title)

    def _draw_axes(self, axes: Axes) -> None:
        values = [value for curve in self.curves for value in _extent(curve)]
        lowest = min(values, default=0.0)
        if self.bottom is not None:
            axes.set_ylim(bottom=self.bottom if lowest >= self.bottom else lowest - 3)
        axes.set_ylim(top=self.top)
        last = max((x for curve in self.curves for x in curve.x), default=1.0)
        margin = max(0.02 * last, 0.05)
        axes.set_xlim(-margin, last + margin)
        for value, label in self.lines:
            axes.axhline(value, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
            axes.annotate(label, (0.02, value), xycoords=("axes fraction", "data"), ha="left", va="top", color=INK)
        for position in self.divisions:
            axes.axvline(position, color=RULE, linewidth=0.8)
        axes.set_xlabel(self.x_label, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(colors=INK, length=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(RULE)


def _draw(axes: Axes, curve: Curve) -> None:
    colour = SERIES[curve.series % NUM_COLOURS]
    is_marked = len(curve.x) <= MAX_MARKED and not curve.faint and not curve.chosen
    axes.plot(
        curve.x,
        curve.y,
        color=colour,
        linestyle=DASHES[curve.series % len(DASHES)] if is_marked else "-",
        marker=list(MARKERS)[curve.series % len(MARKERS)] if is_marked else "",
        markersize=5,
        linewidth=0.7 if curve.faint else 1.8,
        alpha=0.55 if curve.faint else 1,
        clip_on=False,  # whole markers at 0 and 100%
    )
    if curve.chosen:
        points = [curve.x[i] for i in curve.chosen], [curve.y[i] for i in curve.chosen]
        axes.plot(*points, color=colour, linestyle="", marker=list(MARKERS)[curve.series % len(MARKERS)], markersize=6)
    if curve.deviation is not None:
        y, deviation = np.asarray(curve.y), np.asarray(curve.deviation)
        axes.fill_between(curve.x, y - deviation, y + deviation, color=colour, alpha=0.16, linewidth=0)


def _extent(curve: Curve) -> list[float]:
    half = np.zeros(len(curve.y)) if curve.deviation is None else np.asarray(curve.deviation)
    return [*(np.asarray(curve.y) - half), *(np.asarray(curve.y) + half)]


def _in_page(svg: str, name: str, title: str) -> Markup:
    """Adapt a drawing to the page: unique ids, the page's font and colours, transparent background, any width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", svg)  # a hundredth of a point is enough
    for index, colour in enumerate(SERIES):
        svg = svg.replace(colour, f"var(--series-{index})")
    svg = svg.replace(INK, "var(--ink-soft)").replace(RULE, "var(--rule)")
    svg = re.sub(r"<svg ", lambda _: f'<svg role="img" aria-label="{escape(title)}" ', svg, count=1)
    return Markup(svg)  # noqa: S704 - drawn by matplotlib from numbers and our own words
