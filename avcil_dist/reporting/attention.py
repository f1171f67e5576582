"""Figures of attention: clips with their maps, a row for each step, streams side by side. What all forms share.

`attention_page.py` writes them as a page, `attention_picture.py` as a picture, `attention_video.py` as a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from avcil_dist.models.attention.token_map import Box, TokenMap

HEAT = (255, 64, 0)  # red, green, blue of the overlay
MAX_OPACITY = 200  # of 255, where the attention is highest
FILM_RATE = 10  # frames a second of a video


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
    """A clip with its rows: `frames` uint8 (T, H, W, 3), `waveform` float32 (samples,) at `sample_rate` Hz.

    `region`: the part of the picture that makes the sound, where it is known. `film`: more of its frames, at
    `FILM_RATE` a second, for a video.
    """

    name: str
    frames: np.ndarray
    waveform: np.ndarray
    sample_rate: int
    rows: Sequence[AttentionRow]
    region: Box | None = None
    film: np.ndarray | None = None


def frame_positions(tokens: TokenMap, num_frames: int) -> list[int]:
    """The time position of the map at each frame."""
    count = len(tokens.mass)
    return [frame * count // num_frames for frame in range(num_frames)]


def heat_picture(tokens: TokenMap, position: int) -> Image.Image:
    """The map within a frame as a transparent picture of a pixel a cell.

    It is clear where the map is lowest and opaque where it is highest; a frame without a share is clear.
    """
    spatial = tokens.spatial[position]
    lowest, highest = spatial.min(), spatial.max()
    opacity = MAX_OPACITY * (spatial - lowest) / ((highest - lowest) or 1.0)
    pixels = np.empty((*spatial.shape, 4), dtype=np.uint8)
    pixels[..., :3], pixels[..., 3] = HEAT, opacity.round()
    return Image.fromarray(pixels, "RGBA")


def row_label(row: AttentionRow) -> str:
    """Step, predicted class and share on the region, where it is known, of a row."""
    share = "" if row.share is None else f" · on the region {row.share:.0%}"
    return f"step {row.step}: {row.predicted}{share}"
