"""Step artifacts: everything that step k hands to step k + 1 and to later readers.

`step_003/` holds `model.safetensors`, `method.safetensors`, `method.json`, `memory.json`, `scenario.json`,
`metrics.json`, `config.yaml`, and last `COMMITTED.json` with the size and the digest of each file. A folder
without `COMMITTED.json` is no artifact. Every read verifies digests; nothing is unpickled.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.scenario import Scenario
from avcil_dist.streams.commit import (
    decode_state,
    encode_json,
    encode_state,
    has_commit,
    read_commit,
    read_committed_file,
    write_commit,
    write_files,
)
from avcil_dist.streams.identity import Change, read_identity
from avcil_dist.streams.metrics import StreamMetrics

STEP_FOLDER = re.compile(r"step_(\d{3,})")


@dataclass(frozen=True)
class StepArtifact:
    """The result of a step. `model` is a complete state dict: it loads on any world size and ZeRO stage."""

    step: int
    model: dict[str, Tensor]
    method: dict[str, Any]
    memory: ExemplarMemory
    scenario: Scenario
    metrics: StreamMetrics
    config: Config
    manifest_hash: str


@dataclass(frozen=True)
class StepSummary:
    """A step artifact without its weights, method state and memory."""

    step: int
    scenario: Scenario
    metrics: StreamMetrics
    config: Config
    manifest_hash: str


def step_url(stream: str, step: int) -> str:
    """The folder of a step in the folder of its stream."""
    return storage.join(stream, f"step_{step:03d}")


def is_committed(stream: str, step: int) -> bool:
    """Whether the step's artifact is committed."""
    return has_commit(step_url(stream, step))


def committed_steps(stream: str) -> list[int]:
    """The committed steps, in order. A stream resumed on another machine may lack the earlier ones."""
    names = [STEP_FOLDER.fullmatch(name) for name in storage.list_folder(stream)]
    return sorted(step for match in names if match and is_committed(stream, step := int(match[1])))


def save_artifact(stream: str, artifact: StepArtifact) -> str:
    """Write an artifact, `COMMITTED.json` last, and return its folder. Files of an earlier attempt are removed."""
    folder = step_url(stream, artifact.step)
    storage.remove_tree(folder)
    identity = read_identity(stream)
    write_commit(
        folder,
        write_files(folder, _encode(artifact)),
        step=artifact.step,
        manifest_hash=artifact.manifest_hash,
        code_version=avcil_dist.__version__,
        changes=[asdict(change) for change in identity.changes] if identity else [],
    )
    return folder


def load_artifact(stream: str, step: int) -> StepArtifact:
    """Read a committed artifact and verify each of its files.

    Raises ArtifactError, naming the file, when one is missing, damaged or not readable, and for a step that is
    not committed.
    """
    folder, commit = _committed(stream, step)
    files = {name: read_committed_file(folder, name, commit) for name in commit["files"]}
    with _decoding(folder, commit):
        return StepArtifact(
            step=commit["step"],
            model=safetensors.torch.load(files["model.safetensors"]),
            method=decode_state("method", files),
            memory=ExemplarMemory.from_dict(json.loads(files["memory.json"])),
            scenario=_decode_scenario(files["scenario.json"]),
            metrics=_decode_metrics(files["metrics.json"]),
            config=config_from_yaml(files["config.yaml"].decode()),
            manifest_hash=commit["manifest_hash"],
        )


def load_summary(stream: str, step: int) -> StepSummary:
    """Read the small files of a committed step, verified. Raises ArtifactError as `load_artifact` does."""
    folder, commit = _committed(stream, step)
    with _decoding(folder, commit):
        return StepSummary(
            step=step,
            scenario=_decode_scenario(read_committed_file(folder, "scenario.json", commit)),
            metrics=_decode_metrics(read_committed_file(folder, "metrics.json", commit)),
            config=config_from_yaml(read_committed_file(folder, "config.yaml", commit).decode()),
            manifest_hash=commit["manifest_hash"],
        )


def load_metrics(stream: str, step: int) -> StreamMetrics:
    """Read the metrics of a committed step, verified. Raises ArtifactError as `load_artifact` does."""
    folder, commit = _committed(stream, step)
    with _decoding(folder, commit):
        return _decode_metrics(read_committed_file(folder, "metrics.json", commit))


def recorded_changes(stream: str, step: int) -> tuple[Change, ...]:
    """The settings that were changed up to a committed step. Raises ArtifactError as `load_artifact` does."""
    folder, commit = _committed(stream, step)
    with _decoding(folder, commit):
        return tuple(Change(**change) for change in commit.get("changes", ()))


def _committed(stream: str, step: int) -> tuple[str, dict[str, Any]]:
    """A step's folder and its commit."""
    folder = step_url(stream, step)
    if not has_commit(folder):
        raise ArtifactError(f"{folder}: no committed step artifact; run step {step} first")
    return folder, read_commit(folder)


@contextmanager
def _decoding(folder: str, commit: dict[str, Any]) -> Iterator[None]:
    """Raise errors of decoding as ArtifactError: the files are undamaged, but written by another version."""
    try:
        yield
    except (ConfigError, SafetensorError, ValueError, LookupError, TypeError, AttributeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ArtifactError(
            f"{folder}: not readable by avcil-dist {avcil_dist.__version__} ({text}); use version "
            f"{commit.get('code_version')}, which wrote it, or run the step again"
        ) from None


def _encode(artifact: StepArtifact) -> dict[str, bytes]:
    return {
        "model.safetensors": safetensors.torch.save(artifact.model),
        **encode_state("method", artifact.method),
        "memory.json": json.dumps(artifact.memory.to_dict(), indent=1).encode(),  # the order of classes counts
        "scenario.json": encode_json({"steps": artifact.scenario.steps}),
        "metrics.json": encode_json(artifact.metrics.to_dict()),
        "config.yaml": config_to_yaml(artifact.config).encode(),
    }


def _decode_scenario(data: bytes) -> Scenario:
    return Scenario(tuple(tuple(names) for names in json.loads(data)["steps"]))


def _decode_metrics(data: bytes) -> StreamMetrics:
    return StreamMetrics.from_dict(json.loads(data))
