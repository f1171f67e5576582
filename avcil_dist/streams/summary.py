"""Small files of step artifacts: which steps are committed, their scenario, metrics and configuration. No weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

import avcil_dist
from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.scenario import Scenario, configured_scenario
from avcil_dist.streams.commit import (
    COMMITTED,
    Commit,
    Sha256,
    has_commit,
    read_commit,
    read_committed_file,
    read_committed_json,
)
from avcil_dist.streams.identity import Change, StepNumber
from avcil_dist.streams.metrics import Count, StreamMetrics

STEP_FOLDER = re.compile(r"step_([0-9]{3,7})")


class StepCommit(Commit):
    """Commit of a step artifact."""

    step: StepNumber
    manifest_hash: Annotated[str, Field(max_length=64)]
    code_version: Annotated[str, Field(max_length=100)]
    changes: tuple[Change, ...] = ()
    device: Annotated[str, Field(max_length=200)] = ""
    ranks: Count = 0
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    source: Annotated[str, Field(max_length=100)] = ""
    weights: dict[Annotated[str, Field(max_length=100)], Sha256] = Field({}, max_length=10)


@dataclass(frozen=True)
class StepSummary:
    """A step artifact without its weights, method state and memory.

    `device` trained it on `ranks` processes in `seconds`, all interrupted attempts together; `source` is the version
    of the sources, if they are in a git repository; `weights` has the sha256 of the encoders' pre-trained weights by
    setting. Artifacts of old versions lack them.
    """

    step: int
    scenario: Scenario
    metrics: StreamMetrics
    config: Config
    manifest_hash: str
    device: str = ""
    ranks: int = 0
    seconds: float = 0.0
    source: str = ""
    weights: Mapping[str, str] = field(default_factory=dict)


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


def load_summary(stream: str, step: int) -> StepSummary:
    """Read the small files of a committed step, verified.

    Raises ArtifactError, naming the file, when one is missing, damaged or not readable, and for a step that is not
    committed.
    """
    return read_summary(*committed_folder(stream, step))


def load_metrics(stream: str, step: int) -> StreamMetrics:
    """Read the metrics of a committed step, verified. Raises ArtifactError as `load_summary` does."""
    return _read_metrics(*committed_folder(stream, step))


def task_sizes(stream: str, step: int) -> list[int]:
    """Return the number of classes of each task up to a committed step. Raises ArtifactError as `load_summary` does."""
    folder, commit = committed_folder(stream, step)
    scenario = read_committed_json(folder, "scenario.json", commit, Scenario, "a scenario")
    return [len(scenario.new(task)) for task in range(step + 1)]


def recorded_changes(stream: str, step: int) -> tuple[Change, ...]:
    """The settings that were changed up to a committed step. Raises ArtifactError as `load_summary` does."""
    return committed_folder(stream, step)[1].changes


def commit_digest(stream: str, step: int) -> str:
    """Return the sha256 of a committed step's `COMMITTED.json`, which identifies all of its files."""
    return storage.sha256_file(storage.join(step_url(stream, step), COMMITTED))


def committed_folder(stream: str, step: int) -> tuple[str, StepCommit]:
    """Return a step's folder and its commit. Raises ArtifactError when the step is not committed."""
    folder = step_url(stream, step)
    if not has_commit(folder):
        raise ArtifactError(f"{folder}: no committed step artifact; run step {step} first")
    commit = read_commit(folder, StepCommit)
    if commit.step != step:
        raise ArtifactError(f"{folder}: its commit is that of step {commit.step}; restore the folder of step {step}")
    return folder, commit


def read_summary(folder: str, commit: StepCommit) -> StepSummary:
    """Return the summary of a step's folder, verified. Raises ArtifactError as `load_summary` does."""
    summary = StepSummary(
        step=commit.step,
        scenario=read_committed_json(folder, "scenario.json", commit, Scenario, "a scenario"),
        metrics=_read_metrics(folder, commit),
        config=_read_config(folder, commit),
        manifest_hash=commit.manifest_hash,
        device=commit.device,
        ranks=commit.ranks,
        seconds=commit.seconds,
        source=commit.source,
        weights=commit.weights,
    )
    _check_scenario(folder, summary)
    return summary


def _read_metrics(folder: str, commit: StepCommit) -> StreamMetrics:
    metrics = read_committed_json(folder, "metrics.json", commit, StreamMetrics, "the metrics of a stream")
    if metrics.step != commit.step:
        raise ArtifactError(f"{folder}/metrics.json: those of step {metrics.step}; run step {commit.step} again")
    return metrics


def _read_config(folder: str, commit: StepCommit) -> Config:
    try:
        return config_from_yaml(read_committed_file(folder, "config.yaml", commit).decode())
    except (ConfigError, UnicodeDecodeError) as error:
        raise ArtifactError(
            f"{folder}/config.yaml: not readable by avcil-dist {avcil_dist.__version__} ({error}); use version "
            f"{commit.code_version}, which wrote it, or run the step again"
        ) from None


def _check_scenario(folder: str, summary: StepSummary) -> None:
    """Raise ArtifactError for a scenario that the step's configuration cannot have given.

    Without a list of classes in the configuration their order is that of the manifest, which `check_manifest_scenario`
    compares; the sizes of the steps are compared here.
    """
    settings, scenario = summary.config.scenario, summary.scenario
    if settings.classes is None:
        settings = settings.model_copy(update={"shuffle_seed": None})
    try:
        expected = configured_scenario(settings, settings.classes or scenario.classes)
    except ConfigError as error:
        raise ArtifactError(f"{folder}/scenario.json: not that of config.yaml ({error}); run the step again") from None
    if expected != scenario or summary.step >= scenario.num_steps:
        raise ArtifactError(f"{folder}/scenario.json: not that of config.yaml; run the step again")
