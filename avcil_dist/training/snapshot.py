"""Snapshots: where a step stands, so that a killed job goes on from there, to the same bits.

`step_003/000000120/`, named by the iterations done, holds `model.safetensors`, `best.safetensors` (the best
epoch so far), `training.json`, the optimizer's state (one file, or one a rank where ZeRO shares it
out), and last `COMMITTED.json`. The newest two are kept until the step is committed. Nothing in
them is ever unpickled.
"""

import json
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist import storage
from avcil_dist.config.compat import result_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.streams.artifact import step_url
from avcil_dist.streams.commit import (
    COMMITTED,
    FileDigests,
    decode_state,
    encode_json,
    encode_state,
    has_commit,
    read_commit,
    read_committed_file,
    read_verified_commit,
    write_commit,
    write_files,
)
from avcil_dist.streams.stream import stream_url
from avcil_dist.training.collectives import decide_together
from avcil_dist.training.engine import Engine
from avcil_dist.training.state import BestEpoch, EpochTotals, TrainingState
from avcil_dist.world import World

NUM_KEPT = 2
SECONDS_A_MINUTE = 60

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """What a step goes on from; `optimizer` is this rank's part, None where the optimizer begins anew."""

    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    state: TrainingState


def snapshots_url(config: Config, step: int) -> str:
    """The folder of a step's snapshots."""
    root = storage.join(config.snapshot.folder, config.stream_name) if config.snapshot.folder else stream_url(config)
    return storage.join(root, "snapshots", f"step_{step:03d}")


def discard_stale(config: Config, step: int, *, own: bool) -> None:
    """Remove snapshots where `step`, the next, has none; `own`: its own too. A kill after a commit leaves some."""
    folder = storage.parent(snapshots_url(config, step))
    names = storage.list_folder(folder)
    if own or not any(name.endswith(f"_{step:03d}") for name in names):
        storage.remove_tree(folder)


@dataclass
class SnapshotManager:
    """Writes and finds the snapshots of one step; all ranks call it together.

    `reset_optimizer` lets a snapshot go on with a fresh optimizer, whatever the number of ranks.
    """

    config: Config
    manifest_hash: str
    step: int
    world: World
    reset_optimizer: bool = False
    _iteration: int = field(default=0, init=False)
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    @property
    def folder(self) -> str:
        """Where they are."""
        return snapshots_url(self.config, self.step)

    def is_due(self, iteration: int) -> bool:
        """Whether this rank holds that it is time for one, by its clock or by the number of iterations."""
        settings, since = self.config.snapshot, iteration - self._iteration
        by_count = settings.every_iterations is not None and since >= settings.every_iterations
        return since > 0 and (
            by_count or time.monotonic() - self._saved_at >= settings.every_minutes * SECONDS_A_MINUTE
        )

    def save(self, engine: Engine, state: TrainingState, totals: dict[str, Any]) -> None:
        """Commit a snapshot; `totals` is the record of the epoch's totals over all ranks."""
        folder = storage.join(self.folder, f"{state.iteration:09d}")
        model = engine.state()
        files = self._optimizer_files(engine)
        if self.world.is_main:
            files |= _encode(model, state, totals)
        decide_together(lambda: storage.remove_tree(folder))  # an earlier one at this place may be damaged
        records: list[FileDigests] = [{}] * self.world.size
        dist.all_gather_object(records, write_files(folder, files))
        decide_together(lambda: self._commit(folder, {name: part[name] for part in records for name in part}))
        self._iteration, self._saved_at = state.iteration, time.monotonic()

    def load_newest(self, device: torch.device) -> Snapshot | None:
        """The newest whole snapshot; None where there is none. A damaged one is passed over with a warning.

        Raises ConfigError for one that was made with other settings, or whose optimizer does not fit these ranks.
        """
        found: str | None = decide_together(self._find)
        if found is None:
            return None
        commit = read_commit(found)
        training = json.loads(read_committed_file(found, "training.json", commit))
        best = training["best"]
        if best is not None:
            weights = safetensors.torch.load(read_committed_file(found, "best.safetensors", commit))
            best = BestEpoch(weights, best["epoch"], best["val_accuracy"])
        totals = EpochTotals.from_dict(training["totals"], device, is_main=self.world.is_main)
        self._iteration = training["iteration"]
        return Snapshot(
            safetensors.torch.load(read_committed_file(found, "model.safetensors", commit)),
            None if self.reset_optimizer else self._read_optimizer(found, commit),
            TrainingState(training["iteration"], best, totals, set(training["counters"])),
        )

    def keep(self, name: str, state: dict[str, Any]) -> None:
        """Commit what is made once a step, and not in each snapshot; all ranks give the same."""
        folder = self._kept(name)

        def write() -> None:
            storage.remove_tree(folder)
            self._seal(folder, write_files(folder, encode_state(name, state)))

        decide_together(write)

    def kept(self, name: str) -> dict[str, Any] | None:
        """What `keep` committed in this step, with the settings of now; None where there is none, or it is damaged."""
        folder = self._kept(name)
        commit: dict[str, Any] | None = decide_together(lambda: self._find_kept(folder))
        if commit is None:
            return None
        return decode_state(name, {file: read_committed_file(folder, file, commit) for file in commit["files"]})

    def discard(self) -> None:
        """Remove all of the step's snapshots: it is committed."""
        decide_together(lambda: storage.remove_tree(storage.parent(self.folder)))

    @property
    def _identity(self) -> dict[str, Any]:
        """What a snapshot must agree in with the step that goes on from it."""
        before = storage.join(step_url(stream_url(self.config), self.step - 1), COMMITTED)
        return {
            "manifest_hash": self.manifest_hash,
            "previous_step": storage.sha256(storage.read_bytes(before)) if self.step else None,
        }

    def _optimizer_name(self) -> str:
        return f"optimizer_rank{self.world.rank:03d}" if self.config.engine.zero_stage else "optimizer"

    def _optimizer_files(self, engine: Engine) -> dict[str, bytes]:
        """Without ZeRO all ranks hold the same; one writes it, and any number of ranks can read it."""
        if not (self.world.is_main or self.config.engine.zero_stage):
            return {}
        return encode_state(self._optimizer_name(), engine.optimizer_state())

    def _read_optimizer(self, folder: str, commit: dict[str, Any]) -> dict[str, Any]:
        name = self._optimizer_name()
        parts = (f"{name}.safetensors", f"{name}.json")
        return decode_state(name, {part: read_committed_file(folder, part, commit) for part in parts})

    def _kept(self, name: str) -> str:
        return storage.join(storage.parent(self.folder), f"{name}_{self.step:03d}")

    def _find_kept(self, folder: str) -> dict[str, Any] | None:
        if not has_commit(folder):
            return None
        try:
            commit = read_verified_commit(folder)
        except ArtifactError as error:
            _logger.warning("%s; it is made again", error)
            return None
        is_ours = all(commit[key] == value for key, value in self._identity.items())
        return commit if is_ours and not result_changes(commit["settings"], flatten(self.config)) else None

    def _commit(self, folder: str, records: FileDigests) -> None:
        self._seal(folder, records)
        for name in storage.list_folder(self.folder)[:-NUM_KEPT]:
            storage.remove_tree(storage.join(self.folder, name))

    def _seal(self, folder: str, records: FileDigests) -> None:
        write_commit(
            folder,
            records,
            settings=flatten(self.config),
            world_size=self.world.size,
            zero_stage=self.config.engine.zero_stage,
            **self._identity,
        )

    def _find(self) -> str | None:
        for name in reversed(storage.list_folder(self.folder)):
            folder = storage.join(self.folder, name)
            if not has_commit(folder):
                continue
            try:
                commit = read_verified_commit(folder)
            except ArtifactError as error:
                _logger.warning("%s; passing over this snapshot", error)
                continue
            if any(commit[key] != value for key, value in self._identity.items()):
                _logger.warning("%s: of other data or of another step before; passing over this snapshot", folder)
                continue
            self._check_fits(folder, commit)
            return folder
        return None

    def _check_fits(self, folder: str, commit: dict[str, Any]) -> None:
        for change in result_changes(commit["settings"], flatten(self.config)):
            raise ConfigError(
                f"{folder}: step {self.step} was begun with {change.key}={change.before}, not {change.after}; "
                "choose another name=, or begin the step anew with --restart-step"
            )
        size, stage = commit["world_size"], commit["zero_stage"]
        fits = stage == self.config.engine.zero_stage and (stage == 0 or size == self.world.size)
        if not fits and not self.reset_optimizer:
            raise ConfigError(
                f"{folder}: its optimizer is that of {size} processes at ZeRO stage {stage}, these are "
                f"{self.world.size} at stage {self.config.engine.zero_stage}; start it as it was, keep weights and "
                "position with --reset-optimizer, or begin the step anew with --restart-step"
            )


def _encode(model: dict[str, Tensor], state: TrainingState, totals: dict[str, Any]) -> dict[str, bytes]:
    best = state.best
    selected = None if best is None else {"epoch": best.epoch, "val_accuracy": best.val_accuracy}
    training = {"iteration": state.iteration, "best": selected, "totals": totals, "counters": sorted(state.counters)}
    files = {
        "model.safetensors": safetensors.torch.save(model),
        "training.json": encode_json(training),
    }
    return files if best is None else files | {"best.safetensors": safetensors.torch.save(best.state)}
