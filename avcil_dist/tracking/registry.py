"""A stream's final model in MLflow's model registry, and what `mlflow.pyfunc.load_model` makes of it.

The model holds the step artifact as it was committed (safetensors, json, yaml) or a reference to
it, and names this module as its loader: nothing of it is unpickled or executed.

A model of raw clips takes a table with a column `clip` (the bytes of a video file) or `path`
(a path or url of one). A model of features takes two arrays by name, `visual` (clips, frames, positions,
dim) and `audio` (clips, dim). Both give a table: `class`, its `score`, and `scores`, one of each class
in the order of the model's metadata `classes`. Scores are the method's own: the largest is the prediction.
"""

import io
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
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.errors import ArtifactError, ConfigError, DataError
from avcil_dist.inference import Predictor
from avcil_dist.streams.artifact import load_artifact, load_summary, step_url
from avcil_dist.streams.commit import COMMITTED
from avcil_dist.streams.stream import scenario_of
from avcil_dist.tracking.client import COMMITTED_TAG, STREAM_TAG

ABOUT = "about.json"
PLACE = "model"  # of the run's artifacts
EXAMPLE_DECIMALS = 2  # an example is for people to see; a feature's digits would be tens of MB of text
# What predicting needs, beside this package; the versions are those that the weights were trained with.
NEEDED = ("mlflow", "torch", "torchvision", "torchaudio", "transformers", "timm", "safetensors", "av", "numpy")
NEEDED_ALSO = ("pandas", "fsspec", "pydantic", "pyyaml", "deepspeed", "webdataset", "filelock", "tenacity")


def register_model(client: MlflowClient, run_id: str, stream: str, step: int, *, name: str, uri: str | None) -> None:
    """Make the weights of a committed step a version of a registered model, once.

    `uri` is where the step's files lie, for a model that refers to them; None for one that holds them. Raises
    DataError where step or data are gone.
    """
    committed = storage.sha256_file(storage.join(step_url(stream, step), COMMITTED))
    for held in client.search_model_versions(f"name = '{name}'"):
        if held.run_id == run_id and held.tags.get(COMMITTED_TAG) == committed:
            return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, PLACE)
        with storage.local_copy(step_url(stream, step)) as local:
            _save_model(folder, Path(local), stream, step, run_id, uri)
        client.log_artifacts(run_id, str(folder), PLACE)
    if not any(held.name == name for held in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name)
    run = client.get_run(run_id)
    tags = {COMMITTED_TAG: committed, STREAM_TAG: run.data.tags[STREAM_TAG]}
    client.create_model_version(name, source=f"{run.info.artifact_uri}/{PLACE}", run_id=run_id, tags=tags)


def _save_model(folder: Path, local: Path, stream: str, step: int, run_id: str, uri: str | None) -> None:
    origin = load_summary(stream, step)
    manifest = load_manifest(origin.config.data.manifest)
    committed = storage.sha256_file(str(local / COMMITTED))
    about = {"step": step, "shape": manifest.shape, "uri": uri, "committed": committed}
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "data")
        data.mkdir()
        (data / ABOUT).write_text(json.dumps(about, indent=1))
        if uri is None:
            Path(data, step_url(".", step)).symlink_to(local)
        scenario = scenario_of(origin.config, manifest)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(data),
            mlflow_model=Model(run_id=run_id, artifact_path=PLACE),
            signature=_signature(manifest),
            input_example=_example(manifest, scenario.classes[0]),
            pip_requirements=_requirements(),
            metadata={"classes": list(scenario.seen(step)), "config": origin.config.stream_name, "step": step},
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
    """A test clip of the first class, in the form that `predict` takes."""
    clips = manifest.clips([class_name], "test")
    if manifest.kind == "clip":
        return pd.DataFrame({"clip": [_member(manifest, "mp4", clips[:1])]})
    frames, positions, dim = (manifest.shape[name] for name in ("frames", "positions", "dim"))
    visual, audio = (
        np.load(io.BytesIO(_member(manifest, f"{name}.npy", clips[:1])), allow_pickle=False).astype(np.float32)
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
    """Pinned, as they are here; this package itself comes from its wheel, which an index need not have."""
    found = [f"avcil-dist=={avcil_dist.__version__}"]
    for name in (*NEEDED, *NEEDED_ALSO):
        try:
            found.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return found


def _load_pyfunc(path: str) -> "RegisteredModel":
    """What MLflow calls with the model's data folder. Raises ArtifactError for files that are missing or damaged."""
    about = storage.read_json(str(Path(path, ABOUT)))
    folder = step_url(path, about["step"]) if about["uri"] is None else str(about["uri"])
    try:
        digest = storage.sha256_file(storage.join(folder, COMMITTED))
    except DataError as error:
        raise ArtifactError(f"{error}; the model is kept by reference and needs that place") from None
    if digest != about["committed"]:
        raise ArtifactError(f"{folder}/{COMMITTED}: damaged, its digest is not the one registered")
    return RegisteredModel(Predictor(load_artifact(storage.parent(folder), about["step"]), about["shape"], folder))


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
