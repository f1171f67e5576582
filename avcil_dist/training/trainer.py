"""The training loop of a step: iterations, the epoch that is selected, snapshots in between."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from avcil_dist.config.schema import Config
from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_on_device
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import rows_at_a_time
from avcil_dist.data.reader import COUNTS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.errors import DataError, StepStopped, TrainingError
from avcil_dist.methods.base import Method
from avcil_dist.models.network import Network
from avcil_dist.signals import StopRequest
from avcil_dist.training.collectives import Votes, collect_texts, gather_rows
from avcil_dist.training.engine import Engine
from avcil_dist.training.evaluation import Evaluator
from avcil_dist.training.exemplar_copies import local_exemplars
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.observer import Observer
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.state import BestEpoch, EpochTotals, TrainingState
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache, build_teacher_cache
from avcil_dist.training.train_step import train_step

LOSSES_AT_A_TIME = 16  # reading a loss waits for the device, so it is not done in each iteration


@dataclass
class Trainer:
    """The training loop of a step."""

    config: Config
    method: Method
    teacher: Teacher | None
    evaluator: Evaluator
    features: InferencePass
    source: TrainingSampler
    observer: Observer
    device: torch.device
    snapshots: SnapshotManager
    stop: StopRequest
    _unread: list[tuple[Tensor, np.ndarray]] = field(default_factory=list, init=False)  # losses and clips
    _answers: TeacherCache | None = field(default=None, init=False)

    @cached_property
    def votes(self) -> Votes:
        """What the ranks ask each other."""
        return Votes(self.config.engine.timeout_minutes)

    @cached_property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return len(self.source.epoch_batches(0))

    @property
    def num_iterations(self) -> int:
        """Batches of the step."""
        return self.per_epoch * self.config.optim.epochs

    def train(self, student: Network) -> BestEpoch:
        """Train all epochs, from the newest snapshot on, and select one of them.

        Raises StepStopped on all ranks when one was asked to stop.
        """
        snapshot = self.snapshots.load_newest(self.device)
        state = TrainingState()
        if snapshot:
            student.load_state_dict(snapshot.model)
            state = snapshot.state
        if self.teacher and not self.config.data.augment.is_on:  # what is varied is new to the teacher each time
            self._answers = self._asked(self.teacher)
            self.teacher.use_cache(self._answers)
        labels = self.features.scenario.labels
        with local_exemplars(replace(self.source, start=state.iteration)) as (source, manifest):
            engine = self._make_engine(student)
            if snapshot and snapshot.optimizer is not None:
                engine.load_optimizer_state(snapshot.optimizer)
            batches = load_on_device(
                source,
                manifest=manifest,
                labels=labels,
                data=self.config.data,
                device=self.device,
                clip_cache=self.features.clip_cache,
            )
            best = self._train(engine, batches, state, manifest)
            engine.close()
        return best

    def _train(self, engine: Engine, batches: Iterator[Batch], state: TrainingState, manifest: Manifest) -> BestEpoch:
        self.observer.begin(self.source.step, self.config.optim.epochs, self.num_iterations, state.iteration)
        engine.network.train()
        while state.iteration < self.num_iterations:
            self._iterate(engine, batches, state)
            if len(self._unread) == LOSSES_AT_A_TIME:
                self._read_losses(state, manifest)
            if state.iteration % self.per_epoch == 0:
                self._read_losses(state, manifest)
                self._end_epoch(engine, state)
            is_stopping, is_due = self.votes.any(self.stop.is_set(), self.snapshots.is_due(state.iteration))
            if is_stopping or is_due:
                self._read_losses(state, manifest)
                self._save(engine, state)
            if is_stopping:
                raise StepStopped(
                    f"step {self.source.step} stopped after {state.iteration} of {self.num_iterations} iterations; "
                    "run the same command again and it goes on from there"
                )
            self.observer.advance()
        assert state.best is not None
        return state.best

    def _asked(self, teacher: Teacher) -> TeacherCache:
        """What the teacher says to each clip of the step: kept from before the step was stopped, or asked now."""
        clips, manifest = self.source.clips, self.source.manifest
        kept = self.snapshots.kept("teacher")
        answers = TeacherCache.from_state(kept, clips, manifest) if kept else None
        if answers is None:
            self.observer.message(f"the teacher is asked about {len(clips):,} clips, once")
            said = partial(teacher.output, method=self.method)
            answers = build_teacher_cache(said, self.features, clips, after_batch=self._stop_early)
            self.snapshots.keep("teacher", answers.to_state(manifest))
        return answers.to(self.device)

    def _stop_early(self) -> None:
        if self.votes.any(self.stop.is_set())[0]:
            raise StepStopped(f"step {self.source.step} stopped before its first iteration; run the same command again")

    def _make_engine(self, student: Network) -> Engine:
        optim, world = self.config.optim, self.source.world
        replayed = optim.global_replay_batch if len(self.source.exemplars) else 0
        rows = rows_at_a_time(optim.global_batch // world.size, replayed // world.size, self.config.engine.micro_batch)
        optimizer = build_optimizer(student, optim)
        return Engine(student, optimizer, config=self.config.engine, rows=rows, world=world, device=self.device)

    def _iterate(self, engine: Engine, batches: Iterator[Batch], state: TrainingState) -> None:
        """One batch: trained on, added to the epoch's totals."""
        started, totals = time.monotonic(), state.epoch
        batch = next(batches)
        if self._answers:
            batch = self._answers.mask_missing(batch, self.source.manifest)
        num_bad = self.votes.total(len(batch.faults))  # one a damaged clip
        done = train_step(engine, batch, method=self.method, teacher=self.teacher, num_bad=num_bad)
        totals.reading.update(batch.counts)
        totals.num_bad += done.num_bad
        totals.faults.extend(batch.faults)
        for name, value in done.parts.items():
            totals.losses[name] = totals.losses.get(name, 0) + value.detach()
        self._unread.append((done.parts["loss"].detach(), batch.clips))
        self._check_faults(totals)
        state.iteration += 1
        totals.seconds += time.monotonic() - started

    def _read_losses(self, state: TrainingState, manifest: Manifest) -> None:
        """Stop, on all ranks at once, at a loss that is not finite: what is learnt from it is nothing."""
        unread, self._unread = self._unread, []
        finite = torch.stack([loss for loss, _ in unread]).isfinite().tolist() if unread else []
        if all(finite):
            return
        place = finite.index(False)
        loss, clips = unread[place]
        keys = collect_texts(tuple(manifest.key(int(clip)) for clip in clips))
        raise TrainingError(
            f"step {self.source.step}, iteration {state.iteration - len(unread) + place + 1}: the loss is "
            f"{loss.item()}; lower optim.lr, or look at the clips of this batch: {', '.join(keys)}"
        )

    def _end_epoch(self, engine: Engine, state: TrainingState) -> None:
        """Select, tell the observer, begin the next."""
        epoch, totals = state.iteration // self.per_epoch - 1, state.epoch
        values = {
            f"loss/{'total' if name == 'loss' else name}": value.item() / self.per_epoch
            for name, value in totals.losses.items()
        }
        counts = self._of_all_ranks(totals.reading) | {"damaged_clips": float(totals.num_bad)}
        state.counters.update(name for name, count in counts.items() if count)
        values |= {f"data/{name}": count for name, count in counts.items() if name in state.counters}
        values["speed/clips_per_second"] = self.per_epoch * self.config.optim.global_batch / totals.seconds
        state.best = self._select(engine, epoch, state.best, values)
        state.epoch = EpochTotals()
        self.observer.epoch(epoch, values)

    def _save(self, engine: Engine, state: TrainingState) -> None:
        totals = state.epoch
        record = totals.to_dict(self._of_all_ranks(totals.reading), collect_texts(tuple(totals.faults)))
        self.snapshots.save(engine, state, record)

    def _of_all_ranks(self, reading: Mapping[str, float]) -> dict[str, float]:
        """What reading took, summed over the ranks."""
        names = (*COUNTS, "stall_seconds")
        own = torch.tensor([[reading.get(name, 0.0) for name in names]], dtype=torch.float64, device=self.device)
        return dict(zip(names, gather_rows(own, 1).sum(dim=0).tolist(), strict=True))

    def _check_faults(self, totals: EpochTotals) -> None:
        """Stop, on all ranks at once, when more clips are damaged than an epoch may skip."""
        allowed = self.config.data.max_bad_fraction * self.per_epoch * self.config.optim.global_batch
        if totals.num_bad > allowed:
            named = collect_texts(tuple(totals.faults))[0]
            raise DataError(
                f"{totals.num_bad} damaged clips in an epoch, data.max_bad_fraction allows {allowed:.0f}; "
                f"the first: {named}"
            )

    def _select(self, engine: Engine, epoch: int, best: BestEpoch | None, values: dict[str, float]) -> BestEpoch | None:
        """Keep the better of the best so far and this epoch; ties keep the first."""
        if self.config.optim.keep_epoch == "last":
            is_last = epoch == self.config.optim.epochs - 1
            return BestEpoch(engine.state(), epoch, None) if is_last else None
        step = self.source.step
        predicted = self.evaluator(engine.network, self.method, "val", step, on_batch=lambda: None)
        values["val/accuracy"] = predicted.accuracy
        if best is None or best.val_accuracy is None or predicted.accuracy > best.val_accuracy:
            return BestEpoch(engine.state(), epoch, predicted.accuracy)
        return best
