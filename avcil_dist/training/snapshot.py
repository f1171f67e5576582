"""Snapshots: checkpoints within a step. A killed step continues from its newest one and ends in the same bits.

`step_003/000000120/`, named by the number of iterations done, holds `training.json` and for each rank a file
`model_000.safetensors`, `optimizer_000.safetensors`, `best_000.safetensors` (the weights of the best epoch so far) and
`average_000.safetensors` (the moving average of the weights), if there are any. They have the rank's parts of these
tensors (`streams/tensor_parts.py`), so that any number of ranks can continue. `COMMITTED.json` is written last. The
newest two are kept until the step is committed. Nothing in them is ever unpickled.
"""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.config.compat import result_changes
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.errors import ArtifactError
from avcil_dist.models.network import Network
from avcil_dist.streams.commit import (
    FileDigests,
    has_commit,
    read_commit,
    read_committed_json,
    read_verified_commit,
    write_commit,
    write_files,
)
from avcil_dist.streams.snapshots import (
    SnapshotCommit,
    check_snapshot_fits,
    is_of_step,
    snapshot_identity,
    snapshots_url,
)
from avcil_dist.streams.tensor_parts import Assembly, Parts, Target, flat_view, part_key, share
from avcil_dist.streams.tensors import encode_state, read_committed_tensors, read_state, write_tensors
from avcil_dist.training.background_writer import BackgroundWriter
from avcil_dist.training.collectives import Votes, decide_together
from avcil_dist.training.engine import Engine
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.training_state import (
    BestEpoch,
    EpochTotals,
    TrainingRecord,
    TrainingState,
    encode_training,
)
from avcil_dist.training.weights import begin_copy

NUM_KEPT = 2
SECONDS_PER_MINUTE = 60

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Snapshot:
    """A loaded snapshot; its weights are in the network.

    `average` is this rank's share of the moving average of the weights, if there is one. The optimizer's state is still
    in `folder`.
    """

    folder: str
    commit: SnapshotCommit
    state: TrainingState
    average: Parts | None


def discard_stale(config: Config, step: int, *, own: bool) -> None:
    """Delete snapshots left behind by finished steps, as a kill after a commit leaves them.

    Snapshots of `step`, the next to run, are kept unless `own` is true.
    """
    folder = storage.parent(snapshots_url(config, step))
    names = storage.list_folder(folder)
    if own or not any(name.endswith(f"_{step:03d}") for name in names):
        storage.remove_tree(folder)


class SnapshotManager:
    """Writes, finds and loads the snapshots of one step. All ranks call it together."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.folder = snapshots_url(step.config, step.number)
        self._is_begun = False
        self._writer = BackgroundWriter(lambda value: self.votes.gather_json(value))  # the group is made when used
        self._iteration, self._saved_at = 0, time.monotonic()
        self._started, self._earlier_seconds = self._saved_at, 0.0

    @cached_property
    def votes(self) -> Votes:
        """Decisions that any rank can take for all."""
        return Votes(self.step.config.engine.timeout_minutes)

    @property
    def seconds(self) -> float:
        """Time of the step up to now, in all processes whose snapshots it continues."""
        return self._earlier_seconds + time.monotonic() - self._started

    def is_due(self, iteration: int) -> bool:
        """Whether a snapshot is due, by this rank's clock or by the number of iterations."""
        settings, since = self.step.config.snapshot, iteration - self._iteration
        by_count = settings.every_iterations is not None and since >= settings.every_iterations
        return since > 0 and (
            by_count or time.monotonic() - self._saved_at >= settings.every_minutes * SECONDS_PER_MINUTE
        )

    def save(self, engine: Engine, state: TrainingState, totals: dict[str, Any], average: Parts | None = None) -> None:
        """Begin a snapshot; `totals` are the epoch's totals over all ranks, as `EpochTotals.to_dict` returns them.

        `average` are this rank's parts of the moving average of the weights, if there is one. Training waits
        only while the tensors are copied to host memory; a thread writes them. `advance` commits the snapshot
        when all ranks have.
        """
        folder, world = storage.join(self.folder, f"{state.iteration:09d}"), self.step.world
        self._writer.finish()
        if not self._is_begun:
            decide_together(self._remove_passed_over)
            self._is_begun = True
        kinds: dict[str, Parts | None] = {
            "model": engine.weight_parts(),
            "optimizer": engine.optimizer_parts(),
            "average": average,
        }
        copies = {kind: begin_copy(parts) for kind, parts in kinds.items() if parts is not None}
        best = state.best.parts if state.best else None  # in host memory, and never changed
        training = {"training.json": encode_training(state, totals, self.seconds)} if world.is_main else {}

        def write() -> FileDigests:
            digests = {} if best is None else self._write("best", folder, best)
            for kind, copy in copies.items():
                digests |= self._write(kind, folder, copy())
            copies.clear()  # the memory is not needed any more
            return digests | write_files(folder, training)

        self._writer.begin(write, lambda digests: self._commit_snapshot(folder, digests))
        self._iteration, self._saved_at = state.iteration, time.monotonic()

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing a snapshot."""
        return self._writer.is_busy

    def advance(self) -> None:
        """Commit a snapshot that all ranks have written. Called when no rank `is_busy`.

        Raises, on all ranks, the StorageError of a snapshot that could not be written; the one before stays.
        """
        self._writer.advance()

    def finish(self) -> None:
        """Wait until the newest snapshot is committed. Raises as `advance` does."""
        self._writer.finish()

    def close(self) -> None:
        """End the thread that writes."""
        self._writer.close()

    def _write(self, kind: str, folder: str, parts: Parts) -> FileDigests:
        name = _file(kind, self.step.world.rank)
        return {name: write_tensors(storage.join(folder, name), parts)}

    def _remove_passed_over(self) -> None:
        """Remove snapshots later than the one that the step continues from: unfinished, damaged, or of other data."""
        for name in storage.list_folder(self.folder):
            if not name.isdecimal() or int(name) > self._iteration:
                storage.remove_tree(storage.join(self.folder, name))

    def load_newest(self, student: Network) -> Snapshot | None:
        """Load the newest whole snapshot, its weights into `student`; None where there is none.

        A damaged one is skipped with a warning. Raises ConfigError for a snapshot with other settings, ArtifactError
        for one of another network.
        """
        folder: str | None = decide_together(self._find_newest)
        if folder is None:
            return None
        commit = read_commit(folder, SnapshotCommit)
        training = read_committed_json(folder, "training.json", commit, TrainingRecord, "the state of a training")
        weights = student.state_dict()
        self._read("model", folder, commit, _whole_targets(weights))
        best = None
        if training.best is not None:
            parts = self._read_share("best", folder, commit, weights)
            best = BestEpoch(parts, training.best.epoch, training.best.val_accuracy, training.best.num_ties)
        average = None
        if _file("average", 0) in commit.files:
            trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
            average = self._read_share("average", folder, commit, trained)
        totals = EpochTotals.from_record(training.totals, self.step.device, is_main=self.step.world.is_main)
        self._iteration, self._earlier_seconds = training.iteration, training.seconds
        state = TrainingState(training.iteration, best, totals, set(training.counters), list(training.epochs))
        return Snapshot(folder, commit, state, average)

    def load_optimizer(self, snapshot: Snapshot, engine: Engine) -> None:
        """Load the optimizer's state of a snapshot. Raises ArtifactError for that of another optimizer or network."""
        engine.load_optimizer(self._files("optimizer", snapshot.folder, snapshot.commit), snapshot.folder)

    def _files(self, kind: str, folder: str, commit: SnapshotCommit) -> Iterator[Parts]:
        """Read the parts of a kind, one rank's after the other; first those that this rank would have written."""
        own = _file(kind, self.step.world.rank)
        for name in sorted(commit.files, key=lambda name: (name != own, name)):
            if name.startswith(f"{kind}_"):
                yield read_committed_tensors(folder, name, commit)

    def _read(self, kind: str, folder: str, commit: SnapshotCommit, targets: Mapping[str, Target]) -> None:
        assembly = Assembly(targets, folder)
        for parts in self._files(kind, folder, commit):
            assembly.add(parts)
        assembly.check_complete()

    def _read_share(
        self, kind: str, folder: str, commit: SnapshotCommit, weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Read this rank's share of tensors with the sizes and types of `weights`."""
        world = self.step.world
        ranges = share({name: value.numel() for name, value in weights.items()}, world.rank, world.size)
        parts, targets = {}, {}
        for name, value in weights.items():
            start, count = ranges.get(name, (0, 0))
            own = torch.empty(count, dtype=value.dtype)
            targets[name] = Target(own, start, value.numel())
            if count:
                parts[part_key(name, start)] = own
        self._read(kind, folder, commit, targets)
        return parts

    def save_extra(self, name: str, state: dict[str, Any]) -> None:
        """Commit a state that is made once per step, beside the snapshots. It is the same on all ranks."""
        folder = self._extra_folder(name)

        def write() -> None:
            storage.remove_tree(folder)
            self._commit(folder, write_files(folder, encode_state(name, state)))

        decide_together(write)

    def load_extra(self, name: str) -> dict[str, Any] | None:
        """Load a state that `save_extra` committed in this step with the same settings.

        None where there is none, or it is damaged.
        """
        folder = self._extra_folder(name)
        if not decide_together(lambda: self._has_extra(folder)):
            return None
        return read_state(folder, name, read_commit(folder, SnapshotCommit))

    def discard(self) -> None:
        """Delete all snapshots and extra states of the step, once it is committed."""
        decide_together(lambda: storage.remove_tree(storage.parent(self.folder)))

    def _identity(self) -> dict[str, Any]:
        step = self.step
        return snapshot_identity(step.config, step.number, step.manifest.content_hash)

    def _is_of_this_step(self, commit: SnapshotCommit) -> bool:
        return is_of_step(commit, self._identity())

    def _extra_folder(self, name: str) -> str:
        return storage.join(storage.parent(self.folder), f"{name}_{self.step.number:03d}")

    def _has_extra(self, folder: str) -> bool:
        if not has_commit(folder):
            return False
        try:
            commit = read_verified_commit(folder, SnapshotCommit)
        except ArtifactError as error:
            _logger.warning("%s; it is made again", error)
            return False
        changes = result_changes(commit.settings, flatten(self.step.config))
        return self._is_of_this_step(commit) and not changes

    def _commit_snapshot(self, folder: str, digests: FileDigests) -> None:
        """Commit, and delete all but the newest snapshots."""
        self._commit(folder, digests)
        for name in storage.list_folder(self.folder)[:-NUM_KEPT]:
            storage.remove_tree(storage.join(self.folder, name))

    def _commit(self, folder: str, digests: FileDigests) -> None:
        write_commit(
            folder,
            digests,
            settings=flatten(self.step.config),
            world_size=self.step.world.size,
            zero_stage=self.step.config.engine.zero_stage,
            **self._identity(),
        )

    def _find_newest(self) -> str | None:
        for name in reversed(storage.list_folder(self.folder)):
            folder = storage.join(self.folder, name)
            if not has_commit(folder):
                continue
            try:
                commit = read_verified_commit(folder, SnapshotCommit)
            except ArtifactError as error:
                _logger.warning("%s; skipping this snapshot", error)
                continue
            if not self._is_of_this_step(commit):
                _logger.warning("%s: of other data or of another previous step; skipping this snapshot", folder)
                continue
            check_snapshot_fits(folder, commit, self.step.config, self.step.number)
            return folder
        return None


def _file(kind: str, rank: int) -> str:
    return f"{kind}_{rank:03d}.safetensors"


def _whole_targets(tensors: Mapping[str, Tensor]) -> dict[str, Target]:
    return {name: Target(flat_view(value), 0, value.numel()) for name, value in tensors.items()}
