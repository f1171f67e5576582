"""Training loop of a step: epochs from the newest snapshot on, selection of the best epoch, snapshots in between."""

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_on_device
from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import rows_at_a_time
from avcil_dist.data.reader import COUNTS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.errors import ArtifactError, DataError, StepStopped, TrainingError
from avcil_dist.models.network import Network
from avcil_dist.streams.metrics import EpochMetrics
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.collectives import Votes, collect_texts, gather_rows
from avcil_dist.training.device import out_of_memory_as_line
from avcil_dist.training.engine import Engine
from avcil_dist.training.evaluation import evaluate
from avcil_dist.training.exemplar_copies import local_exemplars
from avcil_dist.training.exemplar_logits import StoredRows
from avcil_dist.training.failure_sync import publishing_failures
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.iteration_metrics import IterationMetrics
from avcil_dist.training.observer import Observer
from avcil_dist.training.optim import build_optimizer, lr_factor
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache, build_teacher_cache
from avcil_dist.training.train_step import StepLosses, train_step
from avcil_dist.training.training_state import BestEpoch, EpochTotals, TrainingState
from avcil_dist.training.weight_average import WeightAverage
from avcil_dist.training.weights import to_host

ITERATIONS_PER_CHECK = 16  # reading a loss waits for the device, so losses are checked in groups


@dataclass
class Trainer:
    """Training loop of a step on one rank. All ranks call it together."""

    step: Step
    teacher: Teacher | None
    inference: InferencePass
    sampler: TrainingSampler
    snapshots: SnapshotManager
    observer: Observer
    stop: StopRequest
    stored: StoredRows | None = None  # logits of exemplars, for a method that needs them
    _unchecked: list[tuple[Tensor, np.ndarray]] = field(default_factory=list, init=False)  # losses and clips
    _teacher_cache: TeacherCache | None = field(default=None, init=False)
    _average: WeightAverage | None = field(default=None, init=False)

    @cached_property
    def votes(self) -> Votes:
        """Decisions that any rank can take for all."""
        return self.snapshots.votes

    @cached_property
    def per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.sampler.batches_per_epoch

    @property
    def num_iterations(self) -> int:
        """Batches of the step."""
        return self.per_epoch * self.step.config.optim.epochs

    def train(self, student: Network) -> BestEpoch:
        """Train all epochs, from the newest snapshot on, and return the best one.

        Raises StepStopped on all ranks when one of them received a stop signal.
        """
        snapshot = self.snapshots.load_newest(student)
        state = TrainingState()
        if snapshot:
            state = snapshot.state
            self._check_position(state)
        if self.teacher and not self.step.config.data.augment.is_on:  # an augmented clip is new in each epoch
            self._teacher_cache = self._load_teacher_cache(self.teacher)
            self.teacher.use_cache(self._teacher_cache)
        with (
            local_exemplars(replace(self.sampler, start=state.iteration)) as (source, manifest),
            closing(self._make_engine(student)) as engine,
            closing(self.snapshots),
            publishing_failures(),  # the other ranks do not wait until these blocks have cleaned up
            out_of_memory_as_line(),
        ):
            if snapshot:
                self.snapshots.load_optimizer(snapshot, engine)
            if (decay := self.step.config.optim.ema) is not None:
                saved = snapshot.average if snapshot else None
                self._average = WeightAverage(engine.network, decay, self.step.world, saved)
            batches = load_on_device(
                source,
                manifest=manifest,
                labels=self.step.scenario.labels,
                data=self.step.config.data,
                device=self.step.device,
                clip_cache=self.inference.clip_cache,
                inputs=self.step.inputs,
                lethal=self.inference.lethal,
            )
            best = self._train(engine, batches, state, manifest)
        self._report_best(best)
        return best

    def _check_position(self, state: TrainingState) -> None:
        """Raise ArtifactError for a snapshot at an iteration that the step does not have, or has no best epoch at."""
        is_over = state.iteration == self.num_iterations
        if state.iteration > self.num_iterations or (is_over and state.best is None):
            raise ArtifactError(
                f"{self.snapshots.folder}: a snapshot of iteration {state.iteration}, the step has "
                f"{self.num_iterations}; begin the step anew with --restart-step"
            )

    def _train(self, engine: Engine, batches: Iterator[Batch], state: TrainingState, manifest: Manifest) -> BestEpoch:
        self.observer.begin(self.step.number, self.step.config.optim.epochs, self.num_iterations, state.iteration)
        engine.network.train()
        if self.step.needs.untrained and state.iteration == 0 and self.step.config.optim.keep_epoch == "best_val":
            accuracy = evaluate(self.step, engine.network, "val", self.inference).accuracy
            state.best = BestEpoch(to_host(engine.weight_parts()), epoch=-1, val_accuracy=accuracy)
        metrics = IterationMetrics(self.step, self.observer, self.votes, self.per_epoch)
        while state.iteration < self.num_iterations and not self._is_out_of_patience(state):
            started, is_due = time.monotonic(), metrics.is_due(state.iteration + 1)
            with metrics.counting(engine.network):
                batch, losses = self._iterate(engine, batches, state, with_norm=is_due)
            if is_due or len(self._unchecked) == ITERATIONS_PER_CHECK:
                self._check_losses(state, manifest)  # waits for the device, which the time includes
            seconds = time.monotonic() - started
            state.epoch.seconds += seconds
            metrics.add(seconds, batch.counts)
            if is_due:
                metrics.report(state.iteration, losses.parts, engine.gradient_norm, self._rate(state.iteration - 1))
            if state.iteration % self.per_epoch == 0:
                self._end_epoch(engine, state)
            is_stopping, is_due, is_busy = self.votes.any(
                self.stop.is_set(), self.snapshots.is_due(state.iteration), self.snapshots.is_busy
            )
            if not is_busy:
                self.snapshots.advance()
            if is_stopping or is_due:
                self._check_losses(state, manifest)
                self._save(engine, state)
            if is_stopping:
                self.snapshots.finish()
                raise StepStopped(
                    f"step {self.step.number} stopped after {state.iteration} of {self.num_iterations} iterations; "
                    "run the same command again to continue"
                )
            self.observer.advance()
        self.snapshots.finish()
        assert state.best is not None
        return replace(state.best, num_epochs=state.iteration // self.per_epoch, epochs=tuple(state.epochs))

    def _load_teacher_cache(self, teacher: Teacher) -> TeacherCache:
        """Load the cache that was saved before the step was stopped, or build it."""
        clips, manifest = self.sampler.clips, self.step.manifest
        saved = self.snapshots.load_extra("teacher")
        cache = TeacherCache.from_state(saved, clips, manifest) if saved else None
        if cache is None:
            self.observer.message(f"teacher cache: computing the outputs for {len(clips):,} clips")
            output = partial(teacher.output, method=self.step.method)
            cache = build_teacher_cache(output, self.inference, clips, after_batch=self._stop_early)
            self.snapshots.save_extra("teacher", cache.to_state(manifest))
        return cache.to(self.step.device)

    def _stop_early(self) -> None:
        if self.votes.any(self.stop.is_set())[0]:
            raise StepStopped(f"step {self.step.number} stopped before its first iteration; run the same command again")

    def _make_engine(self, student: Network) -> Engine:
        config, world = self.step.config, self.step.world
        optim = config.optim
        replayed = optim.global_replay_batch if len(self.sampler.exemplars) else 0
        rows = rows_at_a_time(optim.global_batch // world.size, replayed // world.size, config.engine.micro_batch)
        optimizer = build_optimizer(student, optim)
        return Engine(student, optimizer, config=config.engine, rows=rows, world=world, device=self.step.device)

    def _rate(self, iteration: int) -> float:
        """The learning rate of an iteration, counted from 0."""
        optim = self.step.config.optim
        return optim.lr * lr_factor(optim, iteration, self.per_epoch)

    def _iterate(
        self, engine: Engine, batches: Iterator[Batch], state: TrainingState, *, with_norm: bool
    ) -> tuple[Batch, StepLosses]:
        """Train on one batch and add its losses and counts to the epoch's totals."""
        totals = state.epoch
        batch = next(batches)
        if self._teacher_cache:
            batch = self._teacher_cache.mask_missing(batch, self.step.manifest)
        num_bad = self.votes.total(len(batch.faults))  # one fault per damaged clip
        engine.scale_rates(lr_factor(self.step.config.optim, state.iteration, self.per_epoch))
        losses = train_step(
            engine,
            batch,
            method=self.step.method,
            teacher=self.teacher,
            stored=self.stored,
            num_bad=num_bad,
            with_norm=with_norm,
        )
        totals.reading.update(batch.counts)
        totals.num_bad += losses.num_bad
        totals.faults.extend(batch.faults)
        for name, value in losses.parts.items():
            totals.losses[name] = totals.losses.get(name, 0) + value.detach()
        self._unchecked.append((losses.parts["loss"].detach(), batch.clips))
        self._check_faults(totals)
        state.iteration += 1
        if self._average:
            self._average.update(state.iteration)
        return batch, losses

    def _check_losses(self, state: TrainingState, manifest: Manifest) -> None:
        """Raise TrainingError on all ranks for a loss that is not finite: the weights are worthless after it."""
        unchecked, self._unchecked = self._unchecked, []
        finite = torch.stack([loss for loss, _ in unchecked]).isfinite().tolist() if unchecked else []
        if all(finite):
            return
        first = finite.index(False)
        loss, clips = unchecked[first]
        keys = collect_texts(tuple(manifest.key(int(clip)) for clip in clips))
        raise TrainingError(
            f"step {self.step.number}, iteration {state.iteration - len(unchecked) + first + 1}: the loss is "
            f"{loss.item()}; lower optim.lr, or look at the clips of this batch: {', '.join(keys)}"
        )

    def _end_epoch(self, engine: Engine, state: TrainingState) -> None:
        """Update the best epoch, report the epoch's metrics, and start new totals."""
        epoch, totals = state.iteration // self.per_epoch - 1, state.epoch
        values = {
            f"loss/{'total' if name == 'loss' else name}": value.item() / self.per_epoch
            for name, value in totals.losses.items()
        }
        counts = self._sum_over_ranks(totals.reading) | {"damaged_clips": float(totals.num_bad)}
        state.counters.update(name for name, count in counts.items() if count)
        values |= {f"data/{name}": count for name, count in counts.items() if name in state.counters}
        values["optim/learning_rate"] = self._rate(state.iteration - 1)
        values["speed/clips_per_second"] = self.per_epoch * self.step.config.optim.global_batch / totals.seconds
        if totals.num_bad:
            self.inference.on_faults(collect_texts(tuple(totals.faults)))
        state.best = self._better_epoch(engine, epoch, state.best, values)
        state.epochs.append(
            EpochMetrics(values["loss/total"], values["optim/learning_rate"], values.get("val/accuracy"))
        )
        state.epoch = EpochTotals()
        self.observer.epoch(epoch, values)

    def _save(self, engine: Engine, state: TrainingState) -> None:
        totals = state.epoch
        faults = collect_texts(tuple(totals.faults))
        average = self._average.parts() if self._average else None
        self.snapshots.save(engine, state, totals.to_dict(self._sum_over_ranks(totals.reading), faults), average)

    def _sum_over_ranks(self, reading: Mapping[str, float]) -> dict[str, float]:
        """The counts of reading, summed over the ranks."""
        names = (*COUNTS, "stall_seconds")
        own = torch.tensor([[reading.get(name, 0.0) for name in names]], dtype=torch.float64, device=self.step.device)
        return dict(zip(names, gather_rows(own, 1).sum(dim=0).tolist(), strict=True))

    def _check_faults(self, totals: EpochTotals) -> None:
        """Raise DataError on all ranks when more clips are damaged than an epoch may skip."""
        config = self.step.config
        allowed = config.data.max_bad_fraction * self.per_epoch * config.optim.global_batch
        if totals.num_bad > allowed:
            first_fault = collect_texts(tuple(totals.faults))[0]
            raise DataError(
                f"{totals.num_bad} damaged clips in an epoch, data.max_bad_fraction allows {allowed:.0f}; "
                f"the first: {first_fault}"
            )

    def _better_epoch(
        self, engine: Engine, epoch: int, best: BestEpoch | None, values: dict[str, float]
    ) -> BestEpoch | None:
        """Return the better of `best` and this epoch, by validation accuracy; the earlier one of equals."""
        optim = self.step.config.optim
        is_last = epoch == optim.epochs - 1
        if not (is_last if optim.keep_epoch == "last" else is_last or (epoch + 1) % optim.validate_every == 0):
            return best
        with self._average.applied() if self._average else nullcontext():
            if optim.keep_epoch == "last":
                return BestEpoch(to_host(engine.weight_parts()), epoch, None)
            accuracy = evaluate(self.step, engine.network, "val", self.inference).accuracy
            values["val/accuracy"] = accuracy
            if best is None or best.val_accuracy is None or accuracy > best.val_accuracy:
                return BestEpoch(to_host(engine.weight_parts()), epoch, accuracy)
        return replace(best, num_ties=best.num_ties + (accuracy == best.val_accuracy))

    def _is_out_of_patience(self, state: TrainingState) -> bool:
        """Whether the last `patience` validations were not better than the best one. Depends on `state` alone."""
        optim, best = self.step.config.optim, state.best
        if optim.patience is None or best is None:
            return False
        num_epochs = state.iteration // self.per_epoch
        return num_epochs // optim.validate_every - (best.epoch + 1) // optim.validate_every >= optim.patience

    def _report_best(self, best: BestEpoch) -> None:
        if best.val_accuracy is None:
            return
        later = "1 later one is" if best.num_ties == 1 else f"{best.num_ties} later ones are"
        ties = f"; {later} as good, the first is kept" if best.num_ties else ""
        epochs = self.step.config.optim.epochs
        early = f"; ended early, of {epochs} epochs (optim.patience)" if best.num_epochs < epochs else ""
        self.observer.message(
            f"step {self.step.number}: keeps epoch {best.epoch + 1}/{best.num_epochs}, "
            f"val {best.val_accuracy:.1%}{ties}{early}"
        )
