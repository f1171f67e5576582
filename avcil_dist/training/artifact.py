"""The step artifact: all that step k hands to step k + 1, and to whoever looks later.

`step_003/` holds `model.safetensors`, `method.safetensors`, `method.json`, `memory.json`,
`scenario.json`, `metrics.json`, `config.yaml`, and last `COMMITTED.json` with the size and
digest of each. Without `COMMITTED.json` there is no artifact. Nothing in it is ever unpickled.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.compose import config_from_yaml, config_to_yaml
from avcil_dist.config import Config
from avcil_dist.data.memory import Memory
from avcil_dist.errors import ArtifactError, DataError
from avcil_dist.scenario import Scenario
from avcil_dist.training.metrics import StreamMetrics

FORMAT = 1
COMMITTED = "COMMITTED.json"
STEP_FOLDER = re.compile(r"step_(\d{3,})")


@dataclass(frozen=True)
class StepArtifact:
    """The result of a step. `model` is whole: it loads on any world size and ZeRO stage."""

    step: int
    model: dict[str, Tensor]
    method: dict[str, Any]
    memory: Memory
    scenario: Scenario
    metrics: StreamMetrics
    config: Config
    manifest_hash: str


def step_url(stream: str, step: int) -> str:
    """The folder of a step in the folder of its stream."""
    return storage.join(stream, f"step_{step:03d}")


def is_committed(stream: str, step: int) -> bool:
    """Whether the step's artifact is there, whole."""
    return storage.exists(storage.join(step_url(stream, step), COMMITTED))


def committed_steps(stream: str) -> list[int]:
    """The steps whose artifacts are there, in order. A stream resumed elsewhere need not have the earlier ones."""
    numbers = [STEP_FOLDER.fullmatch(folder.rsplit("/", 1)[-1]) for folder in storage.subfolders(stream)]
    return sorted(step for found in numbers if found and is_committed(stream, step := int(found[1])))


def save_artifact(stream: str, artifact: StepArtifact) -> str:
    """Write an artifact, `COMMITTED.json` last, and return its folder. What an earlier attempt left is removed."""
    folder = step_url(stream, artifact.step)
    storage.remove_tree(folder)
    files = _encode(artifact)
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    storage.write_json(
        storage.join(folder, COMMITTED),
        {
            "format": FORMAT,
            "step": artifact.step,
            "files": {name: {"size": len(data), "sha256": storage.sha256(data)} for name, data in files.items()},
            "manifest_hash": artifact.manifest_hash,
            "code_version": avcil_dist.__version__,
        },
    )
    return folder


def load_artifact(stream: str, step: int) -> StepArtifact:
    """Read a committed artifact and hold every file against its digest.

    Raises ArtifactError, naming the file, for what is missing, uncommitted or damaged.
    """
    folder, committed = _committed(stream, step)
    files = {name: _read(folder, name, record) for name, record in committed["files"].items()}
    return StepArtifact(
        step=committed["step"],
        model=safetensors.torch.load(files["model.safetensors"]),
        method=safetensors.torch.load(files["method.safetensors"]) | json.loads(files["method.json"]),
        memory=Memory.from_record(json.loads(files["memory.json"])),
        scenario=Scenario(tuple(tuple(names) for names in json.loads(files["scenario.json"])["steps"])),
        metrics=StreamMetrics.from_record(json.loads(files["metrics.json"])),
        config=config_from_yaml(files["config.yaml"].decode()),
        manifest_hash=committed["manifest_hash"],
    )


def load_metrics(stream: str, step: int) -> StreamMetrics:
    """The metrics of a committed step alone. Raises ArtifactError as `load_artifact` does."""
    folder, committed = _committed(stream, step)
    return StreamMetrics.from_record(json.loads(_read(folder, "metrics.json", committed["files"]["metrics.json"])))


@dataclass(frozen=True)
class Origin:
    """What a committed step was made with."""

    config: Config
    manifest_hash: str


def load_origin(stream: str, step: int) -> Origin:
    """The origin of a committed step, without reading its weights. Raises ArtifactError as `load_artifact` does."""
    folder, committed = _committed(stream, step)
    text = _read(folder, "config.yaml", committed["files"]["config.yaml"]).decode()
    return Origin(config_from_yaml(text), committed["manifest_hash"])


def _committed(stream: str, step: int) -> tuple[str, dict[str, Any]]:
    """A step's folder and its commit record."""
    folder = step_url(stream, step)
    if not is_committed(stream, step):
        raise ArtifactError(f"{folder}: no committed step artifact; run step {step} first")
    committed: dict[str, Any] = storage.read_json(storage.join(folder, COMMITTED))
    if committed["format"] != FORMAT:
        raise ArtifactError(f"{folder}: artifact of format {committed['format']}, this program reads {FORMAT}")
    return folder, committed


def _encode(artifact: StepArtifact) -> dict[str, bytes]:
    tensors = {name: value for name, value in artifact.method.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in artifact.method.items() if name not in tensors}
    return {
        "model.safetensors": safetensors.torch.save(artifact.model),
        "method.safetensors": safetensors.torch.save(tensors),
        "method.json": _json(plain),
        "memory.json": json.dumps(artifact.memory.to_record(), indent=1).encode(),  # the order of classes counts
        "scenario.json": _json({"steps": artifact.scenario.steps}),
        "metrics.json": _json(artifact.metrics.to_record()),
        "config.yaml": config_to_yaml(artifact.config).encode(),
    }


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _read(folder: str, name: str, record: dict[str, Any]) -> bytes:
    url = storage.join(folder, name)
    try:
        data = storage.read_bytes(url)
    except DataError as error:
        raise ArtifactError(str(error)) from None
    if len(data) != record["size"] or storage.sha256(data) != record["sha256"]:
        raise ArtifactError(f"{url}: damaged, its digest is not the one committed; restore it or run the step again")
    return data
