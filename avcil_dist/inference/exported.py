"""Exported models: a folder with the weights of one step, and `config.json`, written last, which commits them.

Such a folder has all that prediction needs, and nothing of the clips, places and servers of the training: no exemplars,
no urls, no paths. `config.json` has the digest of each other file but the model card; every read verifies them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
import yaml
from pydantic import BaseModel, Field, JsonValue

import avcil_dist
from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import EncoderRecord, FeatureShape
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.inference.predict import Predictor, StoredModel
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.scenario import Scenario
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.commit import Commit, FileDigests, encode_json, read_committed_json, write_files
from avcil_dist.streams.identity import StepNumber
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.tensors import encode_state, read_committed_tensors, read_state

CONFIG = "config.json"
LIBRARY = "avcil-dist"
KEPT = ("name", "seed", "model", "method")  # sections of the configuration that prediction needs, with two parts below
NO_DATA = "none.json"  # a configuration needs a manifest; prediction reads none
PLACE = re.compile(r"/|~|[A-Za-z][\w+.-]*://")  # begin of an absolute path or a url

Kind = Literal["safetensors", "onnx"]
Text = Annotated[str, Field(max_length=200)]


class InputRecord(BaseModel):
    """An input: its shape without the batch, and for clips the preparation that `docs/data.md` describes."""

    shape: list[Annotated[int, Field(ge=1)]] = Field(max_length=4)
    preparation: dict[Text, JsonValue] = Field({}, max_length=20)


class ExportRecord(Commit):
    """Content of `config.json`. `settings` are sections of a configuration, `shape` is that of features."""

    library_name: Literal["avcil-dist"]
    kind: Kind
    version: Text
    step: StepNumber
    scenario: Scenario
    settings: dict[Text, JsonValue] = Field(max_length=20)
    shape: FeatureShape
    encoders: EncoderRecord | None = None
    inputs: dict[Literal["visual", "audio"], InputRecord]
    classes: list[str]
    manifest_hash: Text


def describe(artifact: StepArtifact, shape: Mapping[str, int], encoders: EncoderRecord | None) -> dict[str, Any]:
    """Return the description of a step, without kind and files."""
    return {
        "library_name": LIBRARY,
        "version": avcil_dist.__version__,
        "step": artifact.step,
        "scenario": {"steps": artifact.scenario.steps},
        "settings": _settings(artifact.config),
        "shape": dict(shape),
        "encoders": encoders and without_paths(encoders.model_dump()),
        "inputs": input_records(artifact.config, shape),
        "classes": artifact.scenario.seen(artifact.step),
        "manifest_hash": artifact.manifest_hash,
    }


def input_records(config: Config, shape: Mapping[str, int]) -> dict[str, Any]:
    """Return the inputs of the network that a configuration defines, by name."""
    found: dict[str, Any]
    if shape:
        frames, positions, dim = (shape[name] for name in ("frames", "positions", "dim"))
        found = {"visual": {"shape": [frames, positions, dim]}, "audio": {"shape": [dim]}}
    else:
        found = _clip_inputs(clip_inputs(config.model, config.data.clip))
    modality = config.model.modality
    return found if modality == "both" else {modality: found[modality]}


def write_weights(folder: Path, artifact: StepArtifact) -> FileDigests:
    """Write the weights of the network and the state of the method, and return the digests of the files."""
    state = encode_state("method", artifact.method) if artifact.method else {}
    return write_files(str(folder), {"model.safetensors": safetensors.torch.save(artifact.model), **state})


def write_config(
    folder: Path, kind: Kind, files: FileDigests, artifact: StepArtifact, about: Mapping[str, Any]
) -> None:
    """Write the metrics, and last the description with the digests of all files."""
    files = files | write_files(str(folder), {"metrics.json": encode_json(artifact.metrics.to_dict())})
    record = {"format": 1, "kind": kind, "files": files, **about}
    storage.write_bytes(str(folder / CONFIG), encode_json(record))


def is_export(folder: str) -> bool:
    """Whether a folder has the file of an exported model."""
    return storage.exists(storage.join(folder, CONFIG))


def load_export(folder: str) -> StoredModel:
    """Load the weights of an exported model, verified.

    Raises ArtifactError, naming the file, for one that is missing, damaged, or not readable by this version;
    ConfigError for an ONNX graph, which onnxruntime reads.
    """
    url = storage.join(folder, CONFIG)
    record = storage.read_json(url, ExportRecord, "the description of an exported model", fault=ArtifactError)
    if record.kind == "onnx":
        raise ConfigError(f"{folder}: an ONNX graph, which onnxruntime runs; {folder}/README.md has the lines")
    scenario = record.scenario
    try:
        config = _config(record)
    except ConfigError as error:
        raise ArtifactError(
            f"{url}: not readable by avcil-dist {avcil_dist.__version__} ({error}); use version {record.version}, "
            "which wrote it"
        ) from None
    if record.step >= scenario.num_steps or list(scenario.seen(record.step)) != record.classes:
        raise ArtifactError(f"{url}: its classes are not those of its steps; export the model again")
    has_state = "method.json" in record.files
    artifact = StepArtifact(
        step=record.step,
        model=read_committed_tensors(folder, "model.safetensors", record),
        method=read_state(folder, "method", record) if has_state else {},
        memory=EMPTY_MEMORY,
        scenario=scenario,
        metrics=read_committed_json(folder, "metrics.json", record, StreamMetrics, "the metrics of a stream"),
        config=config,
        manifest_hash=record.manifest_hash,
    )
    return StoredModel(artifact, dict(record.shape), record.encoders, source=folder, recorded_in=url)


def load_predictor(folder: str, device: torch.device | None = None) -> Predictor:
    """Load an exported model as a predictor of clips, or of features. Raises as `load_export` does."""
    found = load_export(folder)
    return Predictor(found.artifact, found.shape, folder, device=device)


def without_paths(value: Any) -> Any:
    """Return settings with the name of each file instead of its place, which is of the machine of the training."""
    if isinstance(value, Mapping):
        return {key: without_paths(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_paths(one) for one in value]
    return value.rstrip("/").rpartition("/")[2] if isinstance(value, str) and PLACE.match(value) else value


def _settings(config: Config) -> dict[str, Any]:
    """The sections that prediction needs."""
    whole = without_paths(config.model_dump(mode="json"))
    parts = {"data": {"clip": whole["data"]["clip"]}, "engine": {"precision": whole["engine"]["precision"]}}
    return {name: whole[name] for name in KEPT} | parts


def _config(record: ExportRecord) -> Config:
    """The configuration of a record. Raises ConfigError for settings that this version does not have."""
    document = {
        **record.settings,
        "data": {**_section(record, "data"), "manifest": NO_DATA},
        "engine": _section(record, "engine"),
        "scenario": {"classes_per_step": [len(step) for step in record.scenario.steps]},
    }
    return config_from_yaml(yaml.safe_dump(document))


def _section(record: ExportRecord, name: str) -> dict[str, JsonValue]:
    section = record.settings.get(name)
    return section if isinstance(section, dict) else {}


def _clip_inputs(inputs: ClipInputs) -> dict[str, Any]:
    pictures, sound = inputs.pictures, inputs.sound
    return {
        "visual": {
            "shape": list(pictures.shape),
            "preparation": {"size": pictures.size, "mean": list(pictures.mean), "std": list(pictures.std)},
        },
        "audio": {
            "shape": list(sound.shape),
            "preparation": {
                "sample_rate": sound.sample_rate,
                "mel_bins": sound.mel_bins,
                "mean": sound.mean,
                "std": sound.std,
            },
        },
    }
