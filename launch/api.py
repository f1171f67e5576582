"""Python API: what `import avcil_dist as avcil` offers, for notebooks and programs. `docs/python-api.md` shows its use.

The functions start the same processes as the command line and raise the same errors (`avcil_dist/errors.py`). No script
needs an `if __name__ == "__main__"` around them. Call them from the main thread, as stop signals are handled there.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avcil_dist import compose, storage
from avcil_dist.config.schema import Config, TrackingConfig
from avcil_dist.data import manifest as manifests
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.shard import Split
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.summary import committed_steps, load_metrics, load_summary, step_url
from avcil_dist.system.process_start import without_main_module
from avcil_dist.training.observer import Observer
from data_shards import build
from data_shards.build_plan import BuildReport
from launch.resume_policy import ResumePolicy

if TYPE_CHECKING:
    from avcil_dist.inference.attention import StepAttention

__all__ = ["Observer", "Prediction", "Stream", "build_shards", "load_config", "load_manifest", "train"]

AnyPath = str | PathLike[str]
Override = str | Mapping[str, Any]
Numbers = np.ndarray | torch.Tensor


@dataclass(frozen=True)
class Prediction:
    """Predicted class of a clip, with the score of each seen class: the largest is the prediction's."""

    clip: str
    class_name: str
    scores: Mapping[str, float]


class Stream:
    """Committed steps of a stream in a folder or at a url.

    `steps` are the numbers of the committed steps at the time of the call. Where a method takes a `step`, the default
    is the last one. Methods raise ArtifactError for a step that is not committed, or damaged.
    """

    def __init__(self, folder: AnyPath) -> None:
        """Open a folder. Raises ArtifactError for one without a committed step."""
        self.folder = fspath(folder).rstrip("/")
        if not self.steps:
            raise ArtifactError(f"{self.folder}: no committed step of a stream; train it, or give another folder")

    @classmethod
    def from_run(cls, run: str, *, uri: str | None = None, folder: AnyPath | None = None) -> "Stream":
        """Download the committed steps of an MLflow run, verify them, and open them.

        `run` is the id or name of a stream's run, `uri` the server or database (by default MLFLOW_TRACKING_URI, else
        the database in `runs`), `folder` the place for the files, by default a temporary one. Raises TrackingError for
        a run that is not found, ArtifactError for missing or damaged files, StorageError for a full disk.
        """
        from avcil_dist.tracking.artifacts import download_step
        from avcil_dist.tracking.client import find_stream
        from avcil_dist.tracking.tags import COMMITTED_TAG
        from avcil_dist.tracking.uris import tracking_uri, with_uri

        server = tracking_uri(with_uri(TrackingConfig(), uri), "runs")
        tracked = find_stream(server, run)
        place = fspath(folder if folder is not None else storage.new_temporary_folder())
        for step, step_run in sorted(tracked.steps.items()):
            if COMMITTED_TAG in step_run.data.tags:
                download_step(tracked.client, server, step_run, step, place)
        return cls(place)

    def __repr__(self) -> str:
        return f"Stream({self.folder!r}, steps={list(self.steps)})"

    @property
    def steps(self) -> tuple[int, ...]:
        """Numbers of the committed steps."""
        return tuple(committed_steps(self.folder))

    @property
    def config(self) -> Config:
        """Resolved configuration of the last step."""
        return load_summary(self.folder, self._step(None)).config

    @property
    def metrics(self) -> StreamMetrics:
        """Metrics after the last step: matrix of accuracies, accuracy by class, forgetting, confusions."""
        return load_metrics(self.folder, self._step(None))

    def classes(self, step: int | None = None) -> tuple[str, ...]:
        """Return the classes seen up to a step, in the order of the scores."""
        number = self._step(step)
        return load_summary(self.folder, number).scenario.seen(number)

    def artifact(self, step: int | None = None) -> StepArtifact:
        """Return the whole artifact of a step: weights, state of the method, memory, metrics, configuration."""
        return load_artifact(self.folder, self._step(step))

    def weights(self, step: int | None = None) -> dict[str, torch.Tensor]:
        """Return the weights of a step's network, by name."""
        return dict(self.artifact(step).model)

    def predict(self, clips: AnyPath | bytes | Iterable[AnyPath | bytes], step: int | None = None) -> list[Prediction]:
        """Predict video files, one or several, given as paths, urls or their bytes, by the network of a step.

        Raises DataError for a clip that cannot be read or decoded, ConfigError for a stream trained on features.
        """
        from avcil_dist.inference.predict import Predictor

        artifact = self.artifact(step)
        source = step_url(self.folder, artifact.step)
        if artifact.config.model.visual.kind == "precomputed":
            raise ConfigError(f"{source}: trained on features; predict_features takes them")
        several = [clips] if isinstance(clips, str | bytes | PathLike) else clips
        given = [
            (f"clip {n}", clip) if isinstance(clip, bytes) else (fspath(clip), None) for n, clip in enumerate(several)
        ]
        contents = ((name, storage.read_bytes(name) if data is None else data) for name, data in given)
        predictor = Predictor(artifact, {}, source)
        return _predictions([name for name, _ in given], predictor.classes, predictor.score_clips(contents))

    def predict_features(self, visual: Numbers, audio: Numbers, step: int | None = None) -> list[Prediction]:
        """Predict features: `visual` (clips, frames, positions, dim) and `audio` (clips, dim)."""
        from avcil_dist.inference.predict import Predictor

        tokens, sound = (torch.as_tensor(values, dtype=torch.float32) for values in (visual, audio))
        shape = dict(zip(("frames", "positions", "dim"), tokens.shape[1:], strict=True))
        artifact = self.artifact(step)
        predictor = Predictor(artifact, shape, step_url(self.folder, artifact.step))
        names = [f"clip {number}" for number in range(len(sound))]
        return _predictions(names, predictor.classes, predictor.score_features(tokens, sound))

    def evaluate(
        self, split: Split = "test", *, manifest: str | None = None, step: int | None = None
    ) -> dict[str, Any]:
        """Evaluate a step on a split, as `avcil eval` does: accuracies with intervals, by task and by class."""
        from avcil_dist.inference.evaluation import evaluation
        from avcil_dist.inference.step_predictions import StepRequest, predict_step
        from launch.local_worlds import current_world

        with without_main_module():
            return evaluation(predict_step(StepRequest(self.folder, step, split, manifest), current_world()))

    def attention(self, clip: AnyPath, step: int | None = None, *, evidence: bool = False) -> "StepAttention":
        """Return the map of a video file by the network of a step, with the predicted class.

        `map.mass` (T, rows, columns) is the share of each part of the picture in the attention, or with `evidence` in
        the evidence for the predicted class. Errors are those of `avcil attention`.
        """
        from avcil_dist.inference.attention import prepare_clips, step_attention
        from avcil_dist.models.encoders.build import clip_inputs

        config = self.config
        prepared = prepare_clips([fspath(clip)], clip_inputs(config.model, config.data.clip))
        [found] = step_attention(self.folder, self._step(step), prepared, heat="evidence" if evidence else "attention")
        return found

    def _step(self, step: int | None) -> int:
        return self.steps[-1] if step is None else step


def load_config(name: AnyPath, *overrides: Override) -> Config:
    """Load a configuration file, or one by its name in the search path, with overrides.

    An override is a word `section.key=value`, or a mapping such as `{"section.key": value}`. Raises ConfigError, one
    line that names file, key, value and what is allowed.
    """
    return compose.load_config(fspath(name), _words(overrides))


def _words(overrides: Iterable[Override]) -> list[str]:
    """Return overrides as words. Raises ConfigError for one that is neither a word nor a mapping."""
    words: list[str] = []
    for override in overrides:
        if isinstance(override, Mapping):
            words += _words_of_mapping(override)
        elif isinstance(override, str):
            words.append(override)
        else:
            raise ConfigError(
                f"{override!r}: {type(override).__name__}; an override is a word section.key=value, or a mapping"
            )
    return words


def _words_of_mapping(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _words_of_mapping(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={json.dumps(value, default=str)}"


def load_manifest(url: AnyPath) -> Manifest:
    """Load the manifest of a set of shards. Raises DataError for a missing or damaged one."""
    return manifests.load_manifest(fspath(url))


def train(
    config: Config | AnyPath,
    *overrides: Override,
    processes: int = 1,
    restart: bool = False,
    observer: Observer | None = None,
) -> Stream:
    """Train all steps of a stream that are not committed yet, as `avcil train` does, and return the stream.

    `config` is a configuration or the argument of `load_config`. `observer` sees the progress, in this process.
    `restart` begins anew. Raises the AvcilError of a step, and KeyboardInterrupt; the same call continues from the last
    snapshot.
    """
    from launch.local import run_stream
    from launch.socket_folder import set_short_socket_folder

    resolved = (
        compose.override_config(config, _words(overrides))
        if isinstance(config, Config)
        else load_config(config, *overrides)
    )
    set_short_socket_folder()
    with without_main_module():
        return Stream(run_stream(resolved, processes=processes, policy=ResumePolicy(restart), observer=observer))


def build_shards(
    source: AnyPath,
    output: AnyPath,
    *,
    clips_per_shard: int = 128,
    min_seconds: float = 0.5,
    processes: int = 1,
    strict: bool = False,
) -> BuildReport:
    """Build shards from a listing or a folder of videos, as `avcil shards build` does.

    Raises ConfigError for an output of other inputs or settings, DataError for a listing without a good clip.
    """
    with without_main_module():
        return build.build_shards(
            Path(source),
            fspath(output),
            clips_per_shard=clips_per_shard,
            min_seconds=min_seconds,
            processes=processes,
            strict=strict,
        )


def _predictions(names: list[str], classes: list[str], scores: torch.Tensor) -> list[Prediction]:
    return [
        Prediction(name, classes[max(range(len(classes)), key=row.__getitem__)], dict(zip(classes, row, strict=True)))
        for name, row in zip(names, scores.tolist(), strict=True)
    ]
