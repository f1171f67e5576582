"""Step artifacts: everything that step k hands to step k + 1 and to later readers.

`step_003/` holds `model.safetensors`, `method.safetensors`, `method.json`, `memory.json`, `scenario.json`,
`metrics.json`, `config.yaml`, `exemplars.safetensors` where the method needs logits that are stored with exemplars, and
last `COMMITTED.json` with the size and the digest of each file. A folder without `COMMITTED.json` is no artifact. Every
read verifies digests; nothing is unpickled.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors.torch
from torch import Tensor

import avcil_dist
from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.data.shard import ClipKey
from avcil_dist.errors import ArtifactError
from avcil_dist.scenario import ClassName, Scenario
from avcil_dist.streams.commit import (
    encode_json,
    read_committed_json,
    write_commit,
    write_files,
)
from avcil_dist.streams.exemplar_logits import FILE as LOGITS_FILE
from avcil_dist.streams.exemplar_logits import ExemplarLogits
from avcil_dist.streams.identity import read_identity
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.summary import committed_folder, read_summary, step_url
from avcil_dist.streams.tensors import encode_state, encode_tensors, read_committed_tensors, read_state


@dataclass(frozen=True)
class StepArtifact:
    """The result of a step. `model` is a complete state dict: it loads on any world size and ZeRO stage.

    `device`: the name of the device that trained it, on `ranks` processes, in `seconds`; `source`: the version of
    the sources. `weights`: the sha256 of the encoders' pre-trained weights, by setting. `exemplar_logits` are those of
    `memory`, where the method needs them.
    """

    step: int
    model: dict[str, Tensor]
    method: dict[str, Any]
    memory: ExemplarMemory
    scenario: Scenario
    metrics: StreamMetrics
    config: Config
    manifest_hash: str
    device: str = ""
    ranks: int = 0
    seconds: float = 0.0
    source: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)
    exemplar_logits: ExemplarLogits | None = None


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
        device=artifact.device,
        ranks=artifact.ranks,
        seconds=round(artifact.seconds, 1),
        source=artifact.source,
        weights=dict(artifact.weights),
    )
    return folder


def load_artifact(stream: str, step: int, *, with_model: bool = True) -> StepArtifact:
    """Read a committed artifact and verify each file that is read. Its `model` is empty if not `with_model`.

    Raises ArtifactError, naming the file, when one is missing, damaged or not readable, and for a step that is
    not committed.
    """
    folder, commit = committed_folder(stream, step)
    summary = read_summary(folder, commit)
    memory = read_committed_json(
        folder, "memory.json", commit, dict[ClassName, tuple[ClipKey, ...]], "an exemplar memory"
    )
    if strangers := memory.keys() - set(summary.scenario.seen(step)):
        raise ArtifactError(f"{folder}/memory.json: has exemplars of {min(strangers)!r}, which is no class seen so far")
    logits = None
    if LOGITS_FILE in commit.files:
        logits = ExemplarLogits.from_tensors(
            read_committed_tensors(folder, LOGITS_FILE, commit),
            num_exemplars=sum(map(len, memory.values())),
            num_classes=summary.scenario.num_seen(step),
            source=f"{folder}/{LOGITS_FILE}",
        )
    return StepArtifact(
        **vars(summary),
        model=read_committed_tensors(folder, "model.safetensors", commit) if with_model else {},
        method=read_state(folder, "method", commit),
        memory=ExemplarMemory(memory),
        exemplar_logits=logits,
    )


def load_model(stream: str, step: int) -> dict[str, Tensor]:
    """Read the weights of a committed artifact, verified. Raises ArtifactError as `load_artifact` does."""
    folder, commit = committed_folder(stream, step)
    return read_committed_tensors(folder, "model.safetensors", commit)


def _encode(artifact: StepArtifact) -> dict[str, bytes]:
    logits = artifact.exemplar_logits
    return {
        **({} if logits is None else {LOGITS_FILE: encode_tensors(logits.to_tensors())}),
        "model.safetensors": safetensors.torch.save(artifact.model),
        **encode_state("method", artifact.method),
        "memory.json": json.dumps(artifact.memory.to_dict(), indent=1).encode(),  # the order of classes counts
        "scenario.json": encode_json({"steps": artifact.scenario.steps}),
        "metrics.json": encode_json(artifact.metrics.to_dict()),
        "config.yaml": config_to_yaml(artifact.config).encode(),
    }
