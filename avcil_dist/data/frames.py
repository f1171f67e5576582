"""Selection of the frames of a clip, and their orientation.

The clip is divided into equal spans; the frame shown at the middle of each span is selected, upright, as RGB.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import av
import numpy as np
import torch

# takes the selected frames, one at a time: uint8 (3, H, W); returns what is kept of it
Reduction = Callable[[torch.Tensor], torch.Tensor]


class Orientation(NamedTuple):
    """Turn that makes a frame upright: transposed, then mirrored vertically and horizontally."""

    is_transposed: bool = False
    flips_rows: bool = False
    flips_columns: bool = False

    @classmethod
    def of(cls, frame: Any) -> "Orientation":
        """The orientation of a frame by its display matrix, which maps (x, y) to (ax + cy, bx + dy)."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), dtype=np.int32).tolist()
        if abs(b) + abs(c) > abs(a) + abs(d):
            return cls(True, b < 0, c < 0)
        return cls(False, d < 0, a < 0)

    def upright_size(self, frame: Any) -> tuple[int, int]:
        """Height and width of the upright frame."""
        return (frame.width, frame.height) if self.is_transposed else (frame.height, frame.width)

    def upright(self, picture: np.ndarray) -> np.ndarray:
        """Turn a picture (H, W, …) upright."""
        if self.is_transposed:
            picture = picture.swapaxes(0, 1)
        if self.flips_rows:
            picture = picture[::-1]
        if self.flips_columns:
            picture = picture[:, ::-1]
        return np.ascontiguousarray(picture)


def presentation_time(stamped: Any) -> float | None:
    """Presentation time of a packet or frame in seconds; its decoding time if it has no other, as in some AVI files."""
    stamp, base = stamped.dts if stamped.pts is None else stamped.pts, stamped.time_base
    return None if stamp is None or base is None else float(stamp * base.numerator / base.denominator)


def span_middles(begin: float, num_frames: int, duration: float) -> list[float]:
    """The middles of equal spans, in seconds."""
    return [begin + (i + 0.5) * duration / num_frames for i in range(num_frames)]


def shown_stamps(stamps: Sequence[int], time_base: Any, num_frames: int, duration: float) -> list[int]:
    """The stamp of the frame shown at each middle, given the presentation stamps of all frames."""
    ordered = sorted(set(stamps))
    times = [stamp * time_base.numerator / time_base.denominator for stamp in ordered]
    return [
        ordered[max(bisect.bisect_right(times, middle) - 1, 0)]
        for middle in span_middles(times[0], num_frames, duration)
    ]


class FrameSelector:
    """Selects from frames in order of time those shown at the middles of equal spans, as upright RGB.

    The first frame begins the first span. A frame is shown until the next one begins, the last one for ever. A
    selected frame is reduced at once, so that one whole frame at a time is in memory.
    """

    def __init__(self, num_frames: int, duration: float, reduce: Reduction | None = None) -> None:
        self._num_frames, self._duration, self._reduce = num_frames, duration, reduce
        self.begin: float | None = None
        self.stamps: list[int | None] = []
        self._middles: list[float] = []
        self._latest: Any = None
        self._size: tuple[int, int] | None = None
        self._selected: list[torch.Tensor] = []
        self._reformatter = av.video.reformatter.VideoReformatter()

    def add(self, frame: Any) -> None:
        """Add the next frame."""
        time = presentation_time(frame)
        if self.begin is None:
            self.begin = 0.0 if time is None else time
            self._middles = span_middles(self.begin, self._num_frames, self._duration)
        elif time is not None:
            self._select_until(time)
        self._latest = frame

    def finish(self) -> torch.Tensor | None:
        """Selected frames (T, 3, H, W), or None without any frame."""
        if self._latest is None:
            return None
        self._select_until(math.inf)
        return torch.stack(self._selected)

    def _select_until(self, time: float) -> None:
        """Select the latest frame, which is shown until `time`, for every middle before it."""
        picture = None
        while len(self._selected) < len(self._middles):
            if self._middles[len(self._selected)] >= time:
                return
            if picture is None:
                picture = self._to_rgb(self._latest)
                picture = self._reduce(picture) if self._reduce else picture
            self._selected.append(picture)
            self.stamps.append(self._latest.pts)

    def _to_rgb(self, frame: Any) -> torch.Tensor:
        # a stream may change its picture size midway; all frames get the size of the first selected one
        orientation = Orientation.of(frame)
        self._size = self._size or orientation.upright_size(frame)
        height, width = self._size[::-1] if orientation.is_transposed else self._size
        picture = self._reformatter.reformat(frame, width=width, height=height, format="rgb24", threads=1).to_ndarray()
        return torch.from_numpy(orientation.upright(picture)).permute(2, 0, 1)
