"""Paired comparison of two predictions of the same clips: of committed steps, or of files of predictions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avcil_dist.data.source_videos import source_of
from avcil_dist.errors import DataError
from avcil_dist.inference.evaluation import described
from avcil_dist.inference.predictions_file import read_labels
from avcil_dist.inference.step_predictions import StepPredictions
from avcil_dist.streams.resampling import DRAWS, LEVEL, compare_paired


@dataclass(frozen=True)
class ClipOutcomes:
    """Key and class of each clip, and whether it is predicted correctly; a damaged clip is not.

    `name` is for errors, `about` describes the origin in the result.
    """

    name: str
    about: dict[str, Any]
    keys: Sequence[str]
    labels: Sequence[str]
    correct: NDArray[np.bool_]

    @property
    def identities(self) -> list[tuple[str, str]]:
        """Class and key of each clip: a key may be in two classes."""
        return list(zip(self.labels, self.keys, strict=True))


def outcomes_of_step(made: StepPredictions) -> ClipOutcomes:
    """Return the outcomes of a step's predictions."""
    labels = [made.classes[label] for label in made.predicted.labels]
    return ClipOutcomes(made.request.stream, described(made), made.keys, labels, made.correct)


def outcomes_of_file(path: str) -> ClipOutcomes:
    """Return the outcomes in a file of predictions. Raises DataError for a damaged file, and for one without labels."""
    keys, labels, predictions = read_labels(path)
    correct = np.array([label == found for label, found in zip(labels, predictions, strict=True)], dtype=bool)
    return ClipOutcomes(path, {"predictions": path}, keys, labels, correct)


def paired(first: ClipOutcomes, second: ClipOutcomes, *, draws: int = DRAWS, seed: int = 0) -> dict[str, Any]:
    """Return the difference of two accuracies on the same clips.

    Raises DataError where the clips differ, a clip is there twice, or there are none.
    """
    own, others = first.identities, second.identities
    for given, clips in ((first, own), (second, others)):
        if len(set(clips)) < len(clips) or not clips:
            raise DataError(f"{given.name}: {'a clip is there twice' if clips else 'has no clips'}")
    if different := sorted(set(own) ^ set(others)):
        raise DataError(
            f"{first.name} and {second.name}: {len(different)} clips are in one of them only, such as "
            f"{different[0][1]} of {different[0][0]}; compare steps that have seen the same classes, on one split"
        )
    of_second = dict(zip(others, second.correct.tolist(), strict=True))
    aligned = np.array([of_second[clip] for clip in own])
    sources = [source_of(key) for key in first.keys]
    found = compare_paired(first.correct, aligned, sources, seed=seed, draws=draws)
    return {
        "first": first.about | {"seen_accuracy": float(first.correct.mean())},
        "second": second.about | {"seen_accuracy": float(second.correct.mean())},
        "num_clips": len(own),
        "num_sources": len(set(sources)),
        "difference": found.difference,
        "interval": (found.low, found.high),
        "level": LEVEL,
        "draws": draws,
        "only_first": found.only_first,
        "only_second": found.only_second,
        "mcnemar_p": found.p_value,
    }
