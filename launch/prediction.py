"""Prediction of media files: the model that a word names, the files that paths name, and the results as text."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.data.shard import SPLITS
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.inference.exported import is_export, load_export
from avcil_dist.inference.media import MediaFile, MediaPredictor, ScoredFile
from avcil_dist.inference.predict import Modality, Predictor, StoredModel
from avcil_dist.inference.step_predictions import last_step
from avcil_dist.models.encoders.frozen import (
    FrozenEncoders,
    build_frozen_encoders,
    check_digests,
    recorded_encoders,
)
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.score_metrics import probabilities
from avcil_dist.streams.step_data import data_of_step
from avcil_dist.streams.summary import committed_steps, step_url
from avcil_dist.text.visible import visible
from avcil_dist.training.device import DeviceSetting, local_device
from avcil_dist.world import World
from data_shards.clip_bytes import read_clip
from data_shards.listings.listing import VIDEO_ENDINGS, ClipFile
from data_shards.listings.text_files import open_csv, parse_seconds

FEW_FILES = 32  # for so many, the start of processes costs more than they save
NO_DATA = "data.manifest=none.json"  # a configuration needs one; encoders read none
BASE = (NO_DATA, "model.visual.weights=random", "model.audio.weights=random")


@dataclass(frozen=True)
class ModelRequest:
    """The weights that predict: a folder of a stream or an export, or the name of a registered model on `uri`.

    `encoders`: a configuration that names the encoders of a model of features, instead of those recorded.
    """

    model: str
    step: int | None = None
    manifest: str | None = None
    modality: Modality | None = None
    device: DeviceSetting = "auto"
    encoders: str | None = None
    uri: str | None = None


def load_predictor(request: ModelRequest, num_files: int, workers: int | None) -> MediaPredictor:
    """Load the weights, and the encoders where the model was trained on features.

    `workers`: decoding processes; None: one for each core but for a few files. Raises ArtifactError, DataError,
    ConfigError or TrackingError for a model or encoders that cannot be loaded.
    """
    stored = load_stored(request)
    device = local_device(World(), request.device)
    predictor = Predictor(stored.artifact, stored.shape, stored.source, request.modality, device)
    encoders = _encoders(stored, request.encoders, device) if predictor.takes_features else None
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if num_files > FEW_FILES else 0
    return MediaPredictor(predictor, encoders, workers)


def load_stored(request: ModelRequest) -> StoredModel:
    """Load the weights that a request names. Raises as `load_predictor` does."""
    folder = request.model.rstrip("/")
    is_folder = not request.model.startswith("models:/")
    if is_folder and committed_steps(folder):
        step = last_step(folder) if request.step is None else request.step
        artifact = load_artifact(folder, step)
        url = request.manifest or artifact.config.data.manifest
        try:
            manifest = data_of_step(artifact, request.manifest)
        except DataError:
            if request.manifest is not None or artifact.config.model.visual.kind == "precomputed":
                raise
            return StoredModel(artifact, {}, None, step_url(folder, step), url)  # the weights take clips as they are
        seen = artifact.scenario.seen(step)
        num_clips: dict[str, int] = {split: manifest.num_clips(seen, split) for split in SPLITS}
        return StoredModel(artifact, manifest.shape, manifest.encoders, step_url(folder, step), url, num_clips)
    if is_folder and is_export(folder):
        exported = load_export(folder)
        if request.step not in (None, exported.artifact.step):
            raise ConfigError(f"{folder}: an export of step {exported.artifact.step}; leave --step out")
        return exported
    from avcil_dist.config.schema import TrackingConfig
    from avcil_dist.tracking.registered import MODEL_NAME, load_registered
    from avcil_dist.tracking.uris import database_path, tracking_uri, with_uri

    if not MODEL_NAME.fullmatch(request.model):
        raise ConfigError(f"{request.model}: no committed step in this folder; give a stream's folder, or models:/NAME")
    server = tracking_uri(with_uri(TrackingConfig(), request.uri), "runs")
    database = database_path(server)
    if database is not None and not database.exists():  # a look-up makes no database
        raise ConfigError(
            f"{request.model}: no committed step in this folder, and no tracking database {database} that has a model "
            "of this name; give a stream's folder, or --uri"
        )
    return load_registered(server, request.model)


def _encoders(stored: StoredModel, config: str | None, device: torch.device) -> FrozenEncoders:
    """The encoders of a model of features, checked against what is recorded."""
    record = stored.encoders
    if config is not None:
        encoders = build_frozen_encoders(load_config(config, [NO_DATA]), device)
        if record is not None:
            check_digests(encoders, record, stored.recorded_in)
    elif record is not None:
        encoders = recorded_encoders(record, load_config("features", BASE), stored.recorded_in, device)
    else:
        raise ConfigError(
            f"{stored.source}: trained on features, and {stored.recorded_in} does not record their encoders (imported, "
            "or of an earlier version); name a configuration of them by --encoders, such as one that extends features"
        )
    if dict(encoders.shape) != stored.shape:
        raise ConfigError(f"--encoders: features of {dict(encoders.shape)}, and the model takes {stored.shape}")
    return encoders


def find_files(paths: Sequence[str]) -> list[MediaFile]:
    """Return the clips of files, urls, folders (videos in them, at any depth) and csv files with a column `path`.

    A csv may have `start` and `duration`, in seconds; its other columns are passed over. Raises ConfigError for a path
    that does not exist or has no clips; DataError for a faulty csv.
    """
    clips: list[MediaFile] = []
    for path in paths:
        found = list(_files(path))
        if not found:
            endings = ", ".join(sorted(VIDEO_ENDINGS)[:4])
            raise ConfigError(f"{path}: no clips; a folder needs videos ({endings}, …), a csv a row with a path")
        clips += found
    return clips


def _files(path: str) -> Iterator[MediaFile]:
    if storage.is_remote(path):
        yield MediaFile(path, partial(storage.read_bytes, path))
        return
    local = Path(storage.local_path(path) or path)
    if local.is_dir():
        videos = sorted(file for file in local.rglob("*") if file.suffix.lower() in VIDEO_ENDINGS and file.is_file())
        for video in videos:
            yield _file(f"{path.rstrip('/')}/{video.relative_to(local)}", ClipFile(str(video)))
    elif not local.exists():
        raise ConfigError(f"{path}: no such file or folder")
    elif local.suffix.lower() == ".csv":
        yield from _listed(local)
    else:
        yield _file(path, ClipFile(str(local)))


def _file(name: str, file: ClipFile) -> MediaFile:
    return MediaFile(name, partial(read_clip, file))


def _listed(path: Path) -> Iterator[MediaFile]:
    """The clips of a csv, whose paths are relative to it."""
    with open_csv(path) as lines:
        _, header = next(lines, (0, []))
        if "path" not in header:
            raise DataError(f"{path}: its header has no column path; the first line names the columns")
        for line, values in lines:
            row = dict(zip(header, values, strict=False))
            if not row.get("path", "").strip():
                continue
            where = f"{path}: line {line}"
            start, duration = (
                parse_seconds(text, where) if (text := row.get(name)) else None for name in ("start", "duration")
            )
            file = ClipFile(str(path.parent / row["path"]))
            if start is None and duration is None:
                yield _file(row["path"], file)
            else:
                name = f"{row['path']} from {start or 0:g} s"
                yield _file(name, file._replace(cut=(start or 0.0, duration)))


def top_classes(found: ScoredFile, classes: Sequence[str], top: int) -> list[dict[str, Any]]:
    """Return the classes with the highest scores, each with its probability (softmax of the scores) and score."""
    assert found.scores is not None
    chances = probabilities(found.scores[None])[0]
    best = np.argsort(-found.scores, kind="stable")[:top].tolist()
    return [
        {"class": classes[label], "probability": float(chances[label]), "score": float(found.scores[label])}
        for label in best
    ]


def shown_classes(name: str, best: Sequence[dict[str, Any]]) -> str:
    """Return a clip and its class as a line; of several classes, each has a line below the clip."""
    if len(best) == 1:
        return f"{name}: {best[0]['class']} {best[0]['probability']:.3f}"
    return "\n".join([visible(name), *(f"  {one['probability']:.3f}  {visible(one['class'])}" for one in best)])


def stacked(files: Sequence[ScoredFile], num_classes: int) -> np.ndarray:
    """Return the scores of all files (N, C); NaN for those with a fault."""
    missing = np.full(num_classes, np.nan, dtype=np.float32)
    return np.stack([missing if found.scores is None else found.scores for found in files])


def fault_line(found: ScoredFile) -> str:
    """Return the line that names a file that was left out."""
    return found.fault if found.name in found.fault else f"{found.name}: {found.fault}"
