"""Attention figures as an mp4: the frames of each clip under heat, with its sound."""

import io
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from avcil_dist.reporting.attention import (
    FILM_RATE,
    HEAT,
    AttentionRow,
    ClipFigure,
    frame_positions,
    heat_picture,
    row_label,
)

CELL, SMALLEST_CELL = 224, 64  # pixels of a frame's side
LABEL, BAR, GAP, TITLE = 20, 12, 10, 26  # pixels: text over a frame, bars under it, space between cells, text on top
MAX_HEIGHT = 2160
SOUND_RATE = 48_000  # a rate that every player takes
PAPER, INK, PALE = (20, 23, 27), (231, 234, 238), (84, 92, 102)


def attention_video(clips: Sequence[ClipFigure]) -> bytes:
    """Return an mp4 (H.264 and AAC) of the clips one after the other: streams side by side, a row for each step.

    Under each frame is a bar for each of its time positions; the present one is bright.
    """
    canvas = _Canvas(clips)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        video: Any = container.add_stream("libx264", rate=FILM_RATE)
        video.width, video.height, video.pix_fmt = *canvas.size, "yuv420p"
        video.options = {"preset": "veryfast", "crf": "20"}
        audio: Any = container.add_stream("aac", rate=SOUND_RATE, layout="mono")
        audio.time_base = Fraction(1, SOUND_RATE)
        done = 0
        for clip in clips:
            for picture in canvas.pictures(clip):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            sound = _sound(clip)
            frame = av.AudioFrame.from_ndarray(sound[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, done, Fraction(1, SOUND_RATE)
            container.mux(audio.encode(frame))
            done += len(sound)
        container.mux(video.encode(None))
        container.mux(audio.encode(None))
    return buffer.getvalue()


class _Canvas:
    """Places of the cells of a video, which are the same for all clips."""

    def __init__(self, clips: Sequence[ClipFigure]) -> None:
        self.streams = list(dict.fromkeys(row.stream for clip in clips for row in clip.rows))
        self.steps = sorted({row.step for clip in clips for row in clip.rows})
        room = (MAX_HEIGHT - 2 * TITLE) // len(self.steps) - LABEL - BAR - GAP
        self.cell = max(min(CELL, room), SMALLEST_CELL)
        width = GAP + len(self.streams) * (self.cell + GAP)
        height = 2 * TITLE + len(self.steps) * (self.cell + LABEL + BAR + GAP)
        self.size = (width + width % 2, height + height % 2)  # H.264 with 4:2:0 has even sizes
        self.font = ImageFont.load_default(11)

    def pictures(self, clip: ClipFigure) -> Iterator[np.ndarray]:
        """The pictures (H, W, 3) of a clip."""
        film = clip.frames if clip.film is None else clip.film
        for number, frame in enumerate(film):
            picture = Image.new("RGB", self.size, PAPER)
            draw = ImageDraw.Draw(picture)
            self._write(draw, (GAP, 6), clip.name, self.size[0] - 2 * GAP)
            for column, stream in enumerate(self.streams):
                left = GAP + column * (self.cell + GAP)
                self._write(draw, (left, TITLE + 4), stream, self.cell)
                for row in clip.rows:
                    if row.stream == stream:
                        top = 2 * TITLE + self.steps.index(row.step) * (self.cell + LABEL + BAR + GAP)
                        self._draw(picture, draw, (left, top), clip, row, frame, number / len(film))
            yield np.asarray(picture)

    def _draw(
        self,
        picture: Image.Image,
        draw: ImageDraw.ImageDraw,
        corner: tuple[int, int],
        clip: ClipFigure,
        row: AttentionRow,
        frame: np.ndarray,
        time: float,
    ) -> None:
        """Draw a cell: its label, the frame at `time` (a fraction of the clip) under heat, the bars."""
        left, top = corner[0], corner[1] + LABEL
        self._write(draw, (left, corner[1] + 4), row_label(row), self.cell)
        positions = frame_positions(row.map, len(clip.frames))
        position = positions[int(time * len(positions))]
        size = (self.cell, self.cell)
        heat = heat_picture(row.map, position).resize(size, Image.Resampling.BILINEAR)
        picture.paste(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR), (left, top))
        picture.paste(heat, (left, top), heat)
        if clip.region:
            ends = [left + clip.region[1] * self.cell, top + clip.region[0] * self.cell]
            ends += [left + clip.region[3] * self.cell - 1, top + clip.region[2] * self.cell - 1]
            draw.rectangle(ends, outline=(255, 255, 255))
        temporal = row.map.temporal
        width, foot = self.cell / len(temporal), top + self.cell + BAR
        for number, weight in enumerate(temporal / (temporal.max() or 1.0)):
            start = left + number * width
            bar = [start, foot - weight * (BAR - 2), start + max(width - 2, 1), foot]
            draw.rectangle(bar, fill=HEAT if number == position else PALE)

    def _write(self, draw: ImageDraw.ImageDraw, corner: tuple[int, int], text: str, width: int) -> None:
        """Write text, shortened at its end to fit the width."""
        while draw.textlength(text, font=self.font) > width and len(text) > 1:
            text = f"{text[:-2]}…"
        draw.text(corner, text, fill=INK, font=self.font)


def _sound(clip: ClipFigure) -> np.ndarray:
    """The clip's sound at SOUND_RATE, as long as its pictures."""
    film = clip.frames if clip.film is None else clip.film
    length = len(film) * SOUND_RATE // FILM_RATE
    wanted = np.arange(length) * (clip.sample_rate / SOUND_RATE)
    sound = np.interp(wanted, np.arange(max(len(clip.waveform), 1)), clip.waveform if len(clip.waveform) else [0.0])
    sound[wanted >= len(clip.waveform)] = 0
    return sound.clip(-1, 1).astype(np.float32)
