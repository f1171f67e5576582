"""One incremental step: from the artifact of the step before to this step's artifact.

The same code runs in one process on a laptop, under torchrun and in a SLURM job. The
loop itself is `trainer.py`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from avcil_dist.config.schema import Config
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY, ExemplarMemory
from avcil_dist.data.manifest import Manifest, check_shards, load_manifest
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.data.source_videos import source_disjoint
from avcil_dist.methods import make_method
from avcil_dist.methods.base import ClosedFormMethod, Method, StepContext
from avcil_dist.models.network import load_whole_state
from avcil_dist.signals import StopRequest
from avcil_dist.streams.artifact import StepArtifact, save_artifact
from avcil_dist.streams.compat import load_previous
from avcil_dist.streams.metrics import StreamMetrics, accuracy_row, confusion, per_class_accuracy, seen_accuracy
from avcil_dist.streams.stream import scenario_of, shards_of, sole_writer, stream_url
from avcil_dist.training.build import NetworkMaker, network_after
from avcil_dist.training.clip_cache_placement import place_clip_cache
from avcil_dist.training.closed_form import train_closed_form
from avcil_dist.training.collectives import decide_together, local_device, process_group
from avcil_dist.training.engine import set_threads, whole_state
from avcil_dist.training.evaluation import Evaluator, Predictions
from avcil_dist.training.exemplars import exemplar_clips, exemplar_features, update_memory
from avcil_dist.training.failure_sync import Report, print_fault, propagate_failures
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.observer import Observer, ObserverList
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.state import BestEpoch
from avcil_dist.training.trainer import Trainer
from avcil_dist.world import World


def run_step(
    config: Config,
    step: int,
    *,
    world: World,
    observers: Sequence[Observer],
    stop: StopRequest,
    report: Report = print_fault,
    reset_optimizer: bool = False,
) -> StepArtifact:
    """Train, test and commit one step; every rank calls it. Returns what was committed.

    A step that was begun goes on from its newest snapshot. Raises StepStopped, on all ranks, when `stop` was
    set on one and a snapshot is committed. Raises an AvcilError, the same on all ranks, for faults in
    settings, data or artifacts; a rank that could not raise it is ended after it was reported to `report`.
    """
    device = local_device(world)
    set_threads(world)
    with (
        sole_writer(stream_url(config)) if world.is_main else nullcontext(),
        process_group(world, device, config.engine.timeout_minutes) as store,
        propagate_failures(store, world, report),
    ):
        return step_in_group(
            config, step, world=world, observers=observers, device=device, stop=stop, reset_optimizer=reset_optimizer
        )


def step_in_group(
    config: Config,
    step: int,
    *,
    world: World,
    observers: Sequence[Observer],
    device: torch.device,
    stop: StopRequest,
    reset_optimizer: bool = False,
) -> StepArtifact:
    """`run_step` within a process group that is there."""
    observer = ObserverList(observers)
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    previous = load_previous(config, manifest, step)
    decide_together(lambda: check_shards(manifest, shards_of(manifest, scenario, step)))

    method = make_method(config.method)
    method.load_state_dict(previous.method if previous else {})
    context = StepContext(scenario, step)
    method.begin_step(context)
    memory = previous.memory if previous else EMPTY_MEMORY
    source = _training_source(config, manifest, context, method, memory, world)
    store = _store(source, context, method, device, observer) if method.needs.trains_at(step) else None
    features = InferencePass(manifest, scenario, config.data, world, device, store)
    student, teacher = NetworkMaker(config, manifest, context, method, features, device).make(previous)
    evaluator = Evaluator(features, config.optim.global_eval_batch)

    snapshots = SnapshotManager(config, manifest.content_hash, step, world, reset_optimizer)
    if method.needs.trains_at(step):
        trainer = Trainer(config, method, teacher, evaluator, features, source, observer, device, snapshots, stop)
        selected = trainer.train(student)
        student = network_after(config, manifest.shape, scenario, method, step, selected.state.keys()).to(device)
        load_whole_state(student, selected.state, f"step {step}, as trained")
    else:
        observer.begin(step, 0, 0, 0)
        selected = BestEpoch(whole_state(student), epoch=0, val_accuracy=None)
    if isinstance(method, ClosedFormMethod):
        selected = replace(selected, val_accuracy=train_closed_form(method, student, features, manifest, context))
    memory = update_memory(memory, student, config=config, context=context, needs=method.needs, inference=features)
    exemplars = exemplar_features(memory, student, context=context, inference=features) if method.needs.means else None
    method.end_step(exemplars)

    tested = evaluator(student, method, "test", step, on_batch=observer.advance)
    artifact = StepArtifact(
        step=step,
        model=selected.state,
        method=method.state_dict(),
        memory=memory,
        scenario=scenario,
        metrics=_metrics(config, manifest, previous, context, tested, selected),
        config=config,
        manifest_hash=manifest.content_hash,
    )
    decide_together(lambda: save_artifact(stream_url(config), artifact))
    snapshots.discard()
    return artifact


def _store(
    source: TrainingSampler, context: StepContext, method: Method, device: torch.device, observer: Observer
) -> ClipCache | None:
    """Where what each epoch reads stays at hand: clips trained on, unless they are varied, and validation's."""
    clips = NO_CLIPS if source.data.augment.is_on else source.clips
    if source.optim.keep_epoch == "best_val" or method.needs.validation:
        clips = np.union1d(clips, source.manifest.clips(context.scenario.seen(context.step), "val"))
    store, said = place_clip_cache(source.manifest, source.data, clips, source.world, device)
    observer.message(said)
    return store


def _training_source(
    config: Config, manifest: Manifest, context: StepContext, method: Method, memory: ExemplarMemory, world: World
) -> TrainingSampler:
    scenario, step, needs = context.scenario, context.step, method.needs
    exemplars = exemplar_clips(manifest, memory)
    return TrainingSampler(
        manifest=manifest,
        classes=scenario.seen(step) if needs.all_data else scenario.new(step),
        exemplars=exemplars if needs.memory == "replay" else NO_CLIPS,
        joined=exemplars if needs.memory == "join" else NO_CLIPS,
        data=config.data,
        optim=config.optim,
        seed=config.seed,
        step=step,
        world=world,
    )


def _metrics(
    config: Config,
    manifest: Manifest,
    previous: StepArtifact | None,
    context: StepContext,
    tested: Predictions,
    selected: BestEpoch,
) -> StreamMetrics:
    labels, predictions, seen = tested.labels, tested.predictions, context.scenario.seen(context.step)
    disjoint = None
    if config.data.source_disjoint:
        rows = source_disjoint(manifest, context.scenario.classes, tested.clips)
        disjoint = seen_accuracy(labels[rows], predictions[rows]), int(rows.sum())
    return StreamMetrics.after(
        previous.metrics if previous else None,
        step=context.step,
        row=accuracy_row(labels, predictions, context.scenario.head_slices(context.step)),
        seen=seen_accuracy(labels, predictions),
        per_class=per_class_accuracy(labels, predictions, seen),
        num_test_clips=len(labels),
        epoch=selected.epoch,
        val_accuracy=selected.val_accuracy,
        confusion=confusion(labels, predictions, seen),
        source_disjoint=disjoint,
    )
