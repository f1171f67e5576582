"""Registration of a stream's final model in MLflow's model registry, and its loader for `mlflow.pyfunc.load_model`.

The model contains the step artifact as committed (safetensors, json, yaml) or a reference to it, and names this
module as its loader. Nothing of it is unpickled or executed.

Inputs of a model of raw clips: a table with a column `clip` (bytes of a video file), or `path`, a path below the
folder or url that the environment variable AVCIL_CLIPS names. Without it no file is read: the sender of a request
would choose it. Inputs of a model of features: two arrays by name, `visual` (clips, frames, positions, dim) and `audio`
(clips, dim). Output of both: a table with `class`, the predicted one, its `probability`, and `scores`: the probability
of each class by name, the largest first. They are the softmax of the method's scores; those of a method that is not
trained with a softmax (distances, regressions) have the right order and no calibration.

A request that cannot be answered is a RequestError, whose line a server returns at the end of its answer.
"""

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import av
import mlflow.pyfunc
import numpy as np
import pandas as pd
import torch
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.types import ColSpec, DataType, Schema, TensorSpec
from mlflow.types.schema import Map
from pydantic import BaseModel
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.data.manifest import EncoderRecord, FeatureShape, Manifest
from avcil_dist.data.subset import load_data
from avcil_dist.errors import ArtifactError, AvcilError, ConfigError, DataError
from avcil_dist.inference.predict import Predictor
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.commit import COMMITTED, read_commit, read_verified_commit
from avcil_dist.streams.identity import StepNumber
from avcil_dist.streams.stream import scenario_of
from avcil_dist.streams.summary import StepCommit, commit_digest, load_metrics, load_summary, step_url
from avcil_dist.tracking.artifacts import transfer
from avcil_dist.tracking.tags import ACCURACY_TAG, COMMITTED_TAG, STREAM_TAG

ABOUT = "about.json"
MODEL_FOLDER = "model"  # in the run's artifacts
BEST = "best"  # alias of the version with the highest mean accuracy; MLflow itself resolves `latest`
ABOUT_MODEL = (
    "Final model of a class-incremental stream. `models:/NAME/latest` is the newest version, `models:/NAME@best` the "
    "one with the highest mean accuracy over the steps, on the test clips."
)
CLIPS = "AVCIL_CLIPS"  # the folder or url of the clips that a request may name
# Packages that prediction needs, pinned to the versions in use when the weights were trained.
MODEL_PACKAGES = ("torch", "torchvision", "torchaudio", "transformers", "timm", "safetensors", "av", "numpy")
BASE_PACKAGES = ("pandas", "fsspec", "pydantic", "pyyaml", "deepspeed", "webdataset", "filelock", "tenacity")


def register_model(client: MlflowClient, run_id: str, stream: str, step: int, *, name: str, uri: str | None) -> None:
    """Register the weights of a committed step as a version of a model, unless they are registered.

    `uri`: the folder of the step's files for a model that refers to them; None for a model that contains them.
    Raises ArtifactError or DataError when the step or its data no longer exist.
    """
    committed = commit_digest(stream, step)
    for existing in client.search_model_versions(f"name = '{name}'"):
        if existing.run_id == run_id and existing.tags.get(COMMITTED_TAG) == committed:
            return
    with storage.temporary_folder() as temporary:
        folder = Path(temporary, MODEL_FOLDER)
        _save_model(folder, stream, step, run_id, uri, committed)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        transfer(lambda: client.log_artifacts(run_id, str(folder), MODEL_FOLDER), size)
    if not any(model.name == name for model in client.search_registered_models(f"name = '{name}'")):
        client.create_registered_model(name, description=ABOUT_MODEL)
    run, metrics = client.get_run(run_id), load_metrics(stream, step)
    facts = {key: run.data.tags[key] for key in ("method", "benchmark", "seed") if key in run.data.tags}
    version = client.create_model_version(
        name,
        source=f"{run.info.artifact_uri}/{MODEL_FOLDER}",
        run_id=run_id,
        tags={
            COMMITTED_TAG: committed,
            STREAM_TAG: run.data.tags[STREAM_TAG],
            ACCURACY_TAG: f"{metrics.mean_accuracy:.6f}",
        }
        | facts,
        description=f"Step {step} of {run.info.run_name}: mean accuracy {metrics.mean_accuracy:.1%}.",
    )
    versions = {
        str(existing.version): float(existing.tags[ACCURACY_TAG])
        for existing in client.search_model_versions(f"name = '{name}'")
        if ACCURACY_TAG in existing.tags
    } | {str(version.version): metrics.mean_accuracy}
    best = max(versions, key=lambda number: (versions[number], -int(number)))
    client.set_registered_model_alias(name, BEST, best)


def _save_model(folder: Path, stream: str, step: int, run_id: str, uri: str | None, committed: str) -> None:
    summary = load_summary(stream, step)
    manifest = load_data(summary.config.data)
    encoders = manifest.encoders and manifest.encoders.model_dump()
    about = {"step": step, "shape": manifest.shape, "uri": uri, "committed": committed, "encoders": encoders}
    with storage.temporary_folder() as temporary, ExitStack() as copies:
        data = Path(temporary, "data")
        data.mkdir()
        (data / ABOUT).write_text(json.dumps(about, indent=1))
        if uri is None:  # copied by MLflow, which follows links: only files that the commit lists, verified
            source, files = step_url(stream, step), Path(data, step_url(".", step))
            files.mkdir()
            for name in (*read_commit(source, StepCommit).files, COMMITTED):
                (files / name).symlink_to(copies.enter_context(storage.local_copy(storage.join(source, name))))
            read_verified_commit(str(files), StepCommit)
        scenario = scenario_of(summary.config, manifest)
        mlflow.pyfunc.save_model(
            str(folder),
            loader_module=__name__,
            data_path=str(data),
            mlflow_model=Model(run_id=run_id, artifact_path=MODEL_FOLDER),
            signature=_signature(manifest),
            input_example=_example(manifest),
            pip_requirements=_requirements(),
            metadata={"classes": list(scenario.seen(step)), "config": summary.config.stream_name, "step": step},
        )


def _signature(manifest: Manifest) -> ModelSignature:
    outputs = Schema(
        [
            ColSpec(DataType.string, "class"),
            ColSpec(DataType.double, "probability"),
            ColSpec(Map(DataType.double), "scores"),
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


def _example(manifest: Manifest) -> pd.DataFrame | dict[str, np.ndarray]:
    """A made input of `predict`, never a clip of the data set: a model may be shown to more people than its data."""
    if manifest.kind == "clip":
        return pd.DataFrame({"clip": [_made_clip()]})
    frames, positions, dim = (manifest.shape[name] for name in ("frames", "positions", "dim"))
    shapes = {"visual": (1, frames, positions, dim), "audio": (1, dim)}
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in shapes.items()}


def _made_clip() -> bytes:
    """An mp4 of one second: grey pictures that become brighter, and a tone of 440 Hz."""
    rate, pictures, side = 16_000, 8, 64
    wave = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)[None] * 0.3
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as target:
        video, sound = target.add_stream("mpeg4", rate=pictures), target.add_stream("aac", rate=rate, layout="mono")
        video.width = video.height = side
        video.pix_fmt = "yuv420p"
        for number in range(pictures):
            grey = np.full((side, side, 3), 32 * number, dtype=np.uint8)
            target.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        samples = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        samples.sample_rate = rate
        target.mux(sound.encode(samples))
        for stream in (video, sound):
            target.mux(stream.encode(None))
    return file.getvalue()


def _requirements() -> list[str]:
    """Pinned requirements of the installed versions. This package is among them; install it from its wheel."""
    pinned = [f"avcil-dist=={avcil_dist.__version__}", f"mlflow=={mlflow.__version__}"]
    for name in (*MODEL_PACKAGES, *BASE_PACKAGES):
        try:
            pinned.append(f"{name}=={version(name).split('+')[0]}")
        except PackageNotFoundError:
            continue
    return pinned


class About(BaseModel):
    """Content of `about.json`: the step, the shape and the encoders of its features, its folder for a reference."""

    step: StepNumber
    shape: FeatureShape
    uri: str | None
    committed: str
    encoders: EncoderRecord | None = None


def _load_pyfunc(path: str) -> "RegisteredModel":
    """Load a model from its data folder; MLflow calls this. Raises ArtifactError for missing or damaged files."""
    about, artifact, folder = load_described(path)
    return RegisteredModel(Predictor(artifact, about.shape, folder))


def load_described(path: str) -> tuple[About, StepArtifact, str]:
    """Load the description in a model's data folder, the step that it describes, and the step's folder.

    Raises ArtifactError for missing or damaged files.
    """
    about = storage.read_json(str(Path(path, ABOUT)), About, "a description of a model", fault=ArtifactError)
    folder = step_url(path, about.step) if about.uri is None else about.uri
    try:
        digest = storage.sha256_file(storage.join(folder, COMMITTED))
    except DataError as error:
        raise ArtifactError(f"{error}; the model refers to this folder and cannot be loaded without it") from None
    if digest != about.committed:
        raise ArtifactError(f"{folder}/{COMMITTED}: damaged, its digest is not the one registered")
    return about, load_artifact(storage.parent(folder), about.step), folder


class RegisteredModel:
    """A predictor behind MLflow's interface: tables or arrays in, a table out."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    def predict(self, data: Any, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return the class, its probability and that of every class for each clip; the module describes `data`.

        Raises RequestError for a clip that is missing or damaged, and for input of another form.
        """
        try:
            return self._predict(data)
        except AvcilError as error:
            raise RequestError(str(error)) from None

    def _predict(self, data: Any) -> pd.DataFrame:
        predictor = self.predictor
        if predictor.takes_features:
            scores = predictor.score_features(*_features(data))
        else:
            scores = predictor.score_clips(_clips(data))
        rows = [named_scores(row, predictor.classes) for row in scores.double().softmax(dim=1).tolist()]
        best = [next(iter(row.items())) for row in rows]
        return pd.DataFrame(
            {
                "class": [name for name, _ in best],
                "probability": [probability for _, probability in best],
                "scores": rows,
            }
        )


def named_scores(row: Sequence[float], classes: Sequence[str]) -> dict[str, float]:
    """Return the probability of each class by name, the largest first; of equals the earlier class."""
    return dict(sorted(zip(classes, row, strict=True), key=lambda item: -item[1]))


class RequestError(MlflowException, AvcilError):
    """A request that cannot be answered as it is; a server answers with status 400 and this line."""

    def __init__(self, text: str) -> None:
        MlflowException.__init__(self, text, error_code=INVALID_PARAMETER_VALUE)


def _features(data: Any) -> tuple[Tensor, Tensor]:
    """The visual and the audio features in `data`, float32."""
    if not isinstance(data, Mapping) or not {"visual", "audio"} <= set(data):
        raise ConfigError("predict: give {'visual': (clips, frames, positions, dim), 'audio': (clips, dim)}")
    visual, audio = (torch.as_tensor(np.asarray(data[name], dtype=np.float32)) for name in ("visual", "audio"))
    return visual, audio


def _clips(data: Any) -> Iterator[tuple[str, bytes]]:
    """The name in errors and the bytes of each clip in `data`."""
    if not isinstance(data, pd.DataFrame) or not {"clip", "path"} & set(data.columns):
        raise ConfigError("predict: give a table with a column `clip` (bytes of a video) or `path`")
    for row, values in enumerate(data.to_dict("records")):
        raw, path = values.get("clip"), values.get("path")
        if isinstance(raw, bytes | bytearray):
            yield f"clip of row {row}", bytes(raw)
        elif isinstance(path, str):
            yield path, storage.read_bytes(_below_clips(path))
        else:
            raise ConfigError(f"predict: row {row} has neither the bytes of a clip nor a path")


def _below_clips(path: str) -> str:
    """Return the url of a path that a request names. Raises ConfigError unless it is below the folder AVCIL_CLIPS."""
    folder = os.environ.get(CLIPS)
    if not folder:
        raise ConfigError(f"predict: paths are not read; send the bytes in the column clip, or set {CLIPS} to a folder")
    inner = storage.path_below(path, folder) if path.startswith("/") or "://" in path else path
    try:
        url = storage.join(folder, inner or "")
    except DataError:
        raise ConfigError(f"predict: {path!r}: not a path below {CLIPS}") from None
    local = storage.local_path(url)
    if local is not None and not Path(local).resolve().is_relative_to(Path(storage.local_path(folder) or "").resolve()):
        raise ConfigError(f"predict: {path!r}: a link that leaves {CLIPS}")
    return url
