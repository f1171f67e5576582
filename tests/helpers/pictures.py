"""Clips as folders of pictures with a wav, with a known answer: picture i has the grey `grey_of(i)`."""

import io
import wave
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np

from tests.helpers.media import grey_of, tone


def picture(grey: int, size: tuple[int, int] = (64, 48), codec: str = "mjpeg") -> bytes:
    """A picture of one grey; `size` is (width, height) in pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as target:
        stream = target.add_stream(codec, rate=1)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "rgb24"
        frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), grey, np.uint8), format="rgb24")
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return buffer.getvalue()


def wav(path: Path, seconds: float, *, rate: int = 16_000, hertz: float = 440.0) -> Path:
    """Write a tone."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((tone(seconds, rate, hertz) * 32767).astype("<i2").tobytes())
    return path


def series(
    folder: Path, names: Iterable[str], *, sizes: Iterable[tuple[int, int]] = ((64, 48),), sound: float | None = 2.0
) -> Path:
    """Write a picture for each name, of the given sizes in turn, and beside the folder a wav of `sound` seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    turns = list(sizes)
    for number, name in enumerate(names):
        codec = "png" if name.endswith("png") else "mjpeg"
        (folder / name).write_bytes(picture(grey_of(number), turns[number % len(turns)], codec))
    if sound is not None:
        wav(folder.with_name(f"{folder.name}.wav"), sound)
    return folder
