"""Attention figures as a PNG: the figure of a paper."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from avcil_dist.reporting.attention import HEAT, AttentionRow, ClipFigure, frame_positions, heat_picture

FRAME_INCHES = 1.1
LABEL_INCHES = 1.5
BAR_SHARE = 0.16  # height of the bar under a frame, of the frame's
MAX_LABEL = 26  # characters of a line


def attention_picture(clips: Sequence[ClipFigure]) -> bytes:
    """Return a PNG: a row for each clip and step, the streams side by side, under each frame a bar for its weight."""
    streams = list(dict.fromkeys(row.stream for clip in clips for row in clip.rows))
    steps = [(clip, step) for clip in clips for step in sorted({row.step for row in clip.rows})]
    frames = max(len(clip.frames) for clip in clips)
    width = len(streams) * (LABEL_INCHES + FRAME_INCHES * frames)
    figure = Figure(figsize=(width, 0.45 + FRAME_INCHES * (1 + BAR_SHARE) * len(steps)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)  # type: ignore[union-attr, call-arg]
    ratios = [LABEL_INCHES, *([FRAME_INCHES] * frames)] * len(streams)
    grid = figure.subplots(
        len(steps), len(ratios), squeeze=False, gridspec_kw={"width_ratios": ratios, "wspace": 0, "hspace": 0}
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for place, (clip, step) in enumerate(steps):
        for number, stream in enumerate(streams):
            first = number * (frames + 1)
            row = next((row for row in clip.rows if (row.stream, row.step) == (stream, step)), None)
            if row is not None:
                _write_label(grid[place, first], row, "" if place else stream)
                _draw_frames(list(grid[place, first + 1 : first + 1 + frames]), clip, row)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=150, metadata={"Software": None})  # equal figures give equal bytes
    return output.getvalue()


def _write_label(axes: Axes, row: AttentionRow, stream: str) -> None:
    words = [
        f"step {row.step}",
        f"predicted {row.predicted}",
        "" if row.share is None else f"on the region {row.share:.0%}",
    ]
    lines = [word if len(word) <= MAX_LABEL else f"{word[: MAX_LABEL - 1]}…" for word in words if word]
    place: dict[str, Any] = {"transform": axes.transAxes, "fontsize": 7, "parse_math": False}
    axes.text(0.95, 0.5, "\n".join(lines), ha="right", va="center", **place)
    if stream:
        axes.text(0.0, 1.05, stream, ha="left", va="bottom", **(place | {"fontsize": 9, "fontweight": "bold"}))


def _draw_frames(line: Sequence[Axes], clip: ClipFigure, row: AttentionRow) -> None:
    highest = row.map.temporal.max() or 1.0
    for axes, frame, position in zip(line, clip.frames, frame_positions(row.map, len(clip.frames)), strict=False):
        height, width = frame.shape[:2]
        extent = (0, width, height, 0)
        axes.imshow(frame, extent=extent)
        axes.imshow(heat_picture(row.map, position), extent=extent, interpolation="bilinear")
        if clip.region:
            top, left, bottom, right = clip.region
            corner, size = (left * width, top * height), ((right - left) * width, (bottom - top) * height)
            axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linestyle="--", linewidth=0.9))
        weight = row.map.temporal[position] / highest
        bar = (0, height * 1.03), weight * width, height * (BAR_SHARE - 0.06)
        axes.add_patch(Rectangle(*bar, color=[part / 255 for part in HEAT], linewidth=0))
        axes.set_xlim(0, width)
        axes.set_ylim(height * (1 + BAR_SHARE), 0)
