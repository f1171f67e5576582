"""Figures of attention: frames of a clip with a map as heat, a row for each step, streams side by side."""

import base64
import io
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure
from PIL import Image

from avcil_dist import storage
from avcil_dist.errors import ConfigError
from avcil_dist.models.attention.maps import TokenMap

FORMATS = (".html", ".png")
HEAT = (255, 64, 0)  # red, green, blue of the overlay
MAX_OPACITY = 200  # of 255, where the attention is highest
FRAME_INCHES = 1.1


@dataclass(frozen=True)
class AttentionRow:
    """Map of one stream after one step on a clip: the predicted class, and the share on the known region."""

    stream: str
    step: int
    map: TokenMap
    predicted: str
    share: float | None = None


@dataclass(frozen=True)
class ClipFigure:
    """A clip with its rows: `frames` uint8 (T, H, W, 3), `waveform` float32 (samples,) at `sample_rate` Hz."""

    name: str
    frames: np.ndarray
    waveform: np.ndarray
    sample_rate: int
    rows: Sequence[AttentionRow]


def check_format(path: str) -> None:
    """Raise ConfigError for a file name that is none of the formats."""
    if PurePosixPath(path).suffix not in FORMATS:
        raise ConfigError(f"{path}: the figure is written as {' or '.join(FORMATS)}; give a name that ends so")


def write_figure(clips: Sequence[ClipFigure], path: str, heat: str) -> None:
    """Write the figures of clips as one HTML page without scripts, or as a PNG picture, by the ending of `path`.

    `heat` is the kind of the maps, for the text of the page.
    """
    check_format(path)
    storage.write_bytes(path, _picture(clips) if path.endswith(".png") else _page(clips, heat).encode())


def _page(clips: Sequence[ClipFigure], heat: str) -> str:
    environment = Environment(
        loader=PackageLoader("avcil_dist", "reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    views = [
        {
            "name": clip.name,
            "frames": [_uri(_encoded(Image.fromarray(frame), "JPEG"), "image/jpeg") for frame in clip.frames],
            "sound": _uri(_wav(clip.waveform, clip.sample_rate), "audio/wav"),
            "streams": [
                (stream, [_row(row, len(clip.frames)) for row in clip.rows if row.stream == stream])
                for stream in dict.fromkeys(row.stream for row in clip.rows)
            ],
        }
        for clip in clips
    ]
    return environment.get_template("attention.html.j2").render(clips=views, heat=heat)


def _row(row: AttentionRow, num_frames: int) -> dict[str, object]:
    """The template's values of a row. A network with fewer time positions than frames repeats each of them."""
    which = _positions(row.map, num_frames)
    highest = row.map.temporal.max() or 1.0
    return {
        "step": row.step,
        "predicted": row.predicted,
        "share": row.share,
        "cells": [
            {
                "heat": _uri(_encoded(_heat(row.map, position), "PNG"), "image/png"),
                "weight": row.map.temporal[position],
                "height": row.map.temporal[position] / highest,
            }
            for position in which
        ],
    }


def _positions(tokens: TokenMap, num_frames: int) -> list[int]:
    """The time position of the map at each frame."""
    count = len(tokens.mass)
    return [frame * count // num_frames for frame in range(num_frames)]


def _heat(tokens: TokenMap, position: int) -> Image.Image:
    """The map within a frame as a transparent picture of a pixel a cell.

    It is clear where the map is lowest and opaque where it is highest; a frame without a share is clear.
    """
    spatial = tokens.spatial[position]
    lowest, highest = spatial.min(), spatial.max()
    opacity = MAX_OPACITY * (spatial - lowest) / ((highest - lowest) or 1.0)
    pixels = np.empty((*spatial.shape, 4), dtype=np.uint8)
    pixels[..., :3], pixels[..., 3] = HEAT, opacity.round()
    return Image.fromarray(pixels, "RGBA")


def _picture(clips: Sequence[ClipFigure]) -> bytes:
    """All clips as a PNG: a block of rows for each clip and stream, a column for each frame."""
    rows = [(clip, row) for clip in clips for row in clip.rows]
    columns = max(len(clip.frames) for clip in clips)
    figure = Figure(figsize=(2.2 + FRAME_INCHES * columns, 0.3 + FRAME_INCHES * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for (clip, row), line in zip(rows, grid, strict=True):
        share = "" if row.share is None else f"\nin region {row.share:.0%}"
        label = f"{row.stream}\nstep {row.step}: {row.predicted}{share}"
        line[0].text(-0.08, 0.5, label, transform=line[0].transAxes, ha="right", va="center", fontsize=7)
        for axes, frame, position in zip(line, clip.frames, _positions(row.map, len(clip.frames)), strict=False):
            extent = (0, frame.shape[1], frame.shape[0], 0)
            axes.imshow(frame, extent=extent)
            axes.imshow(_heat(row.map, position), extent=extent, interpolation="bilinear")
            axes.set_title(f"{row.map.temporal[position]:.0%}", fontsize=6, pad=2)
    output = io.BytesIO()
    figure.savefig(output, format="png", dpi=150, metadata={"Software": None})  # equal figures give equal bytes
    return output.getvalue()


def _encoded(picture: Image.Image, kind: str) -> bytes:
    output = io.BytesIO()
    picture.save(output, kind)
    return output.getvalue()


def _wav(waveform: np.ndarray, sample_rate: int) -> bytes:
    output = io.BytesIO()
    with wave.open(output, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((waveform.clip(-1, 1) * 32767).astype("<i2").tobytes())
    return output.getvalue()


def _uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
