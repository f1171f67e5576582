"""Registration of a stream's final model in MLflow's model registry, and its loader for `mlflow.pyfunc.load_model`.

The model contains the step artifact as committed (safetensors, json, yaml) or a reference to it, and names this
module as its loader. Nothing of it is unpickled or executed.

Inputs of a model of raw clips: a table with a column `clip` (bytes of a video file) or `path` (path or url of
one). Inputs of a model of features: two arrays by name, `visual` (clips, frames, positions, dim) and `audio`
(clips, dim). Output of both: a table with `class`, its `score`, and `scores`, one per class in the order of the
model's metadata `classes`. Scores are those of the method: the largest is the prediction.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import Array
from pydantic import BaseModel
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.data.manifest import FeatureShape, Manifest, load_manifest
from avcil_dist.data.npy import parse_npy
from avcil_dist.errors import ArtifactError, ConfigError, DataError
from avcil_dist.inference import Predictor
from avcil_dist.streams.artifact import StepCommit, load_artifact, load_summary, step_url
from avcil_dist.streams.commit import COMMITTED, read_verified_commit
from avcil_dist.streams.identity import StepNumber
from avcil_dist.streams.stream import scenario_of
from avcil_dist.tracking.tags import COMMITTED_TAG, STREAM_TAG

ABOUT = "about.json"
MODEL_FOLDER = "model"  # in the run's artifacts
EXAMPLE_DECIMALS = 2  # all digits of an example's features would be tens of MB of text
# Packages that prediction needs, pinned to the versions in use when the weights were trained.
MODEL_PACKAGES = ("mlflow", "torch", "torchvision", "torchaudio", "transformers", "timm", "safetensors", "av", "numpy")
BASE_PACKAGES = ("pandas", "fsspec", "pydantic", "pyyaml", "deepspeed", "webdataset", "filelock", "tenacity")


def register_model(client: MlflowClient, run_id: str, stream: str, step: int, *, name: str, uri: str | None) -> None:
    """Register the weights of a committed step as a version of a model, unless they are registered.

    `uri`: the folder of the step's files for a model that refers to them; None for a model that contains them.
    Raises ArtifactError or DataError when the step or its data no longer exist.
    """
    committed = storage.sha256_file(storage.join(step_url(stream, step), COMMITTED))
    for existing in client.search_model_versions(f"name = '{name}'"):
        if existing.run_id == run_id and existing.tags.get(COMMITTED_TAG) == committed:
            return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, MODEL_FOLDER)
        with storage.local_copy(step_url(stream, step)) as local:
            _save_model(folder, Path(local), stream, step, run_id, uri)
        client.log_artifacts(run_id, str(folder), MODEL_FOLDER)
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    run = client.get_run(run_id)
    tags = {COMMITTED_TAG: committed, STREAM_TAG: run.data.tags[STREAM_TAG]}
    client.create_model_version(name, source=f"{run.info.artifact_uri}/{MODEL_FOLDER}", run_id=run_id, tags=tags)


def _save_model(folder: Path, local: Path, stream: str, step: int, run_id: str, uri: str | None) -> None:
    summary = load_summary(stream, step)
    manifest = load_manifest(summary.config.data.manifest)
    committed = storage.sha256_file(str(local / COMMITTED))
    about = {"step": step, "shape": manifest.shape, "uri": uri, "committed": committed}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        data.mkdir()
        (data / ABOUT).write_text(json.dumps(about, indent=1))
        if uri is None:  # copied by MLflow, which follows links: only files that the commit lists, verified
            files = Path(data, step_url(".", step))
            files.mkdir()
            for name in (*read_verified_commit(str(local), StepCommit).files, COMMITTED):
                (files / name).symlink_to(local / name)
        scenario = scenario_of(summary.config, manifest)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(data),
            mlflow_model=Model(run_id=run_id, artifact_path=MODEL_FOLDER),
            signature=_signature(manifest),
            input_example=_example(manifest, scenario.classes[0]),
            pip_requirements=_requirements(),
            metadata={"classes": list(scenario.seen(step)), "config": summary.config.stream_name, "step": step},
        )


def _signature(manifest: Manifest) -> ModelSignature:
    outputs = Schema(
        [
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "score"),
            ColSpec(Array(DataType.double), "scores"),
        ]
    )
    if manifest.kind == "clip":
        columns = [
            ColSpec(DataType.binary, "clip", required=False),
            ColSpec(DataType.string, "path", required=False),
        ]
        return ModelSignature(Schema(columns), outputs)
    frames, positions, dim = (manifest.shape[name] for name in ("frames", "positions", "dim"))
    tensors = [
        TensorSpec(np.dtype(np.float32), (-1, frames, positions, dim), "visual"),
        TensorSpec(np.dtype(np.float32), (-1, dim), "audio"),
    ]
    return ModelSignature(Schema(tensors), outputs)


def _example(manifest: Manifest, class_name: str) -> pd.DataFrame | dict[str, np.ndarray]:
    """A test clip of the class as an input of `predict`."""
    clips = manifest.clips([class_name], "test")
    if manifest.kind == "clip":
        return pd.DataFrame({"clip": [_member(manifest, "mp4", clips[:1])]})
    frames, positions, dim = (manifest.shape[name] for name in ("frames", "positions", "dim"))
    visual, audio = (
        parse_npy(_member(manifest, f"{name}.npy", clips[:1]), f"{name}.npy").astype(np.float32)
        for name in ("visual", "audio")
    )
    return {
        "visual": visual.reshape(1, frames, positions, dim).round(EXAMPLE_DECIMALS),
        "audio": audio.reshape(1, dim).round(EXAMPLE_DECIMALS),
    }


def _member(manifest: Manifest, name: str, clip: np.ndarray) -> bytes:
    starts, sizes = manifest.spans(name, clip)
    url = manifest.url(int(manifest.shards_of(clip)[0]))
    return storage.read_range(url, int(starts[0]), int(starts[0] + sizes[0]))


def _requirements() -> list[str]:
    """Pinned requirements of the installed versions. This package is among them; install it from its wheel."""
    pinned = [f"avcil-dist=={avcil_dist.__version__}"]
    for name in (*MODEL_PACKAGES, *BASE_PACKAGES):
        try:
            pinned.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return pinned


class _About(BaseModel):
    """Content of `about.json`: the step, the shape of its features, and its folder if the model is a reference."""

    step: StepNumber
    shape: FeatureShape
    uri: str | None
    committed: str


def _load_pyfunc(path: str) -> "RegisteredModel":
    """Load a model from its data folder; MLflow calls this. Raises ArtifactError for missing or damaged files."""
    about = storage.read_json(str(Path(path, ABOUT)), _About, "a description of a model", fault=ArtifactError)
    folder = step_url(path, about.step) if about.uri is None else about.uri
    try:
        digest = storage.sha256_file(storage.join(folder, COMMITTED))
    except DataError as error:
        raise ArtifactError(f"{error}; the model refers to this folder and cannot be loaded without it") from None
    if digest != about.committed:
        raise ArtifactError(f"{folder}/{COMMITTED}: damaged, its digest is not the one registered")
    return RegisteredModel(Predictor(load_artifact(storage.parent(folder), about.step), about.shape, folder))


class RegisteredModel:
    """A predictor behind MLflow's interface: tables or arrays in, a table out."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return the class, its score and all scores of each clip; the module describes `data`.

        Raises DataError for a clip that is missing or damaged, ConfigError for input of another form.
        """
        predictor = self.predictor
        if predictor.takes_features:
            scores = predictor.score_features(*_features(data))
        else:
            scores = predictor.score_clips(_clips(data))
        rows = scores.double().numpy()
        best = rows.argmax(axis=1)
        return pd.DataFrame(
            {
                "class": [predictor.classes[number] for number in best],
                "score": rows[np.arange(len(rows)), best],
                "scores": rows.tolist(),
            }
        )


def _features(data: Any) -> tuple[Tensor, Tensor]:
    """The visual and the audio features in `data`, float32."""
    if not isinstance(data, Mapping) or not {"visual", "audio"} <= set(data):
        raise ConfigError("predict: give {'visual': (clips, frames, positions, dim), 'audio': (clips, dim)}")
    visual, audio = (torch.as_tensor(np.asarray(data[name], dtype=np.float32)) for name in ("visual", "audio"))
    return visual, audio


def _clips(data: Any) -> Iterator[tuple[str, bytes]]:
    """The name in errors and the bytes of each clip in `data`."""
    if not isinstance(data, pd.DataFrame) or not {"clip", "path"} & set(data.columns):
        raise ConfigError("predict: give a table with a column `clip` (bytes of a video) or `path` (a path or url)")
    for row, values in enumerate(data.to_dict("records")):
        raw, path = values.get("clip"), values.get("path")
        if isinstance(raw, bytes | bytearray):
            yield f"clip of row {row}", bytes(raw)
        elif isinstance(path, str):
            yield path, storage.read_bytes(path)
        else:
            raise ConfigError(f"predict: row {row} has neither the bytes of a clip nor a path")
