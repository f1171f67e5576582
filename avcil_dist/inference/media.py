"""Class scores of media files, in batches: a file that cannot be read or decoded is named, and costs nothing else."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.decode_pool import ClipDecoder, DecodePool, EncodedClip, HereDecoder
from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import DataError
from avcil_dist.inference.predict import CLIPS_PER_BATCH, Predictor
from avcil_dist.models.encoders.frozen import FrozenEncoders

BATCHES_AHEAD = 1


@dataclass(frozen=True)
class MediaFile:
    """A clip in a file or in a part of one: its name in results and errors, and a function that returns its bytes."""

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class ScoredFile:
    """The class scores (C,) of a file, or its fault."""

    name: str
    scores: np.ndarray | None
    fault: str = ""


@dataclass(frozen=True)
class MediaPredictor:
    """Scores of media files by a predictor. One of features needs the `encoders` that made the features.

    Files are decoded by `workers` processes, while those before are scored; by this process for 0.
    """

    predictor: Predictor
    encoders: FrozenEncoders | None = None
    workers: int = 0

    def score(self, files: Iterable[MediaFile]) -> Iterator[ScoredFile]:
        """Yield the scores of each file, in order."""
        inputs = self.encoders.inputs if self.encoders else self.predictor.inputs
        transform = ClipTransform(inputs)
        decoder: ClipDecoder = HereDecoder(transform)
        if self.workers:
            decoder = DecodePool(transform, inputs.shapes, self.workers, {})
        rest, coming = enumerate(files), deque[Callable[[], list[ScoredFile]]]()
        try:
            while batch := list(islice(rest, CLIPS_PER_BATCH)):
                coming.append(self._start(batch, decoder, inputs.shapes))
                if len(coming) > BATCHES_AHEAD:
                    yield from coming.popleft()()
            while coming:
                yield from coming.popleft()()
        finally:
            decoder.close()

    def _start(
        self, batch: list[tuple[int, MediaFile]], decoder: ClipDecoder, shapes: tuple[tuple[int, ...], ...]
    ) -> Callable[[], list[ScoredFile]]:
        """Start to decode a batch; the result waits for the end, and scores the files that could be decoded."""
        visual, audio = (torch.zeros(len(batch), *shape) for shape in shapes)
        results: list[Callable[[], DataError | None]] = []
        for row, (number, file) in enumerate(batch):
            try:
                clip = EncodedClip(number, file.name, memoryview(file.read()), None)
            except DataError as error:
                results.append(lambda fault=error: fault)  # type: ignore[misc]
            else:
                results.append(decoder.submit(clip, (visual[row], audio[row])))

        def finish() -> list[ScoredFile]:
            faults = [result() for result in results]
            good = torch.tensor([fault is None for fault in faults])
            rows = iter(self._scores(visual[good], audio[good]) if good.any() else ())
            return [
                ScoredFile(file.name, next(rows)) if fault is None else ScoredFile(file.name, None, str(fault))
                for (_, file), fault in zip(batch, faults, strict=True)
            ]

        return finish

    def _scores(self, visual: Tensor, audio: Tensor) -> np.ndarray:
        if self.encoders:  # in float16, as in a shard
            visual, audio = (part.half() for part in self.encoders.encode(visual, audio))
        scores: np.ndarray = self.predictor.score(visual, audio).float().cpu().numpy()
        return scores
