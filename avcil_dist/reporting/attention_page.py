"""Attention figures as an HTML page without scripts, and as a part of the report page."""

import base64
import io
import wave
from collections.abc import Sequence

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from avcil_dist.reporting.attention import AttentionRow, ClipFigure, frame_positions, heat_picture


def attention_page(clips: Sequence[ClipFigure], heat: str) -> str:
    """Return the page. `heat` is the kind of the maps, for its text."""
    environment = Environment(
        loader=PackageLoader("avcil_dist", "reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("attention.html.j2").render(clips=[clip_view(clip) for clip in clips], heat=heat)


def clip_view(clip: ClipFigure, most: int | None = None) -> dict[str, object]:
    """Return the template's values of a clip, with at most so many of its frames, evenly spread."""
    count = len(clip.frames)
    shown = range(count) if most is None or count <= most else [number * count // most for number in range(most)]
    return {
        "name": clip.name,
        "frames": [_uri(_encoded(Image.fromarray(clip.frames[n]), "JPEG"), "image/jpeg") for n in shown],
        "sound": _uri(_wav(clip.waveform, clip.sample_rate), "audio/wav"),
        "region": clip.region,
        "streams": [
            (stream, [_row(row, count, shown) for row in clip.rows if row.stream == stream])
            for stream in dict.fromkeys(row.stream for row in clip.rows)
        ],
    }


def _row(row: AttentionRow, num_frames: int, shown: Sequence[int]) -> dict[str, object]:
    """The template's values of a row. A network with fewer time positions than frames repeats each of them."""
    positions = frame_positions(row.map, num_frames)
    which = [positions[number] for number in shown]
    highest = row.map.temporal.max() or 1.0
    return {
        "step": row.step,
        "predicted": row.predicted,
        "share": row.share,
        "cells": [
            {
                "heat": _uri(_encoded(heat_picture(row.map, position), "PNG"), "image/png"),
                "weight": row.map.temporal[position],
                "height": row.map.temporal[position] / highest,
            }
            for position in which
        ],
    }


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
