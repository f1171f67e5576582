"""One incremental step: from the artifact of the previous step to the artifact of this step.

The same code runs in one process on a laptop, under torchrun and in a SLURM job. The training loop
is in `trainer.py`.
"""

import datetime
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from avcil_dist import storage
from avcil_dist.config.encoders import TransformerConfig
from avcil_dist.config.schema import Config
from avcil_dist.data.arrival import arrived
from avcil_dist.data.clip_cache import ClipCache
from avcil_dist.data.exemplar_memory import EMPTY_MEMORY
from avcil_dist.data.manifest import Manifest, check_shards
from avcil_dist.data.plan import NO_CLIPS
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.data.source_videos import source_disjoint
from avcil_dist.data.subset import load_data
from avcil_dist.methods import make_method
from avcil_dist.methods.base import ClosedFormMethod
from avcil_dist.models.encoders.adapters import merge_adapters
from avcil_dist.models.network import Network
from avcil_dist.scenario import Scenario
from avcil_dist.streams.artifact import StepArtifact, load_model, save_artifact
from avcil_dist.streams.compat import load_previous
from avcil_dist.streams.metrics import (
    MemoryUse,
    StreamMetrics,
    accuracy_row,
    confusion,
    per_class_accuracy,
    seen_accuracy,
)
from avcil_dist.streams.region_shares import RegionShares
from avcil_dist.streams.score_metrics import score_metrics
from avcil_dist.streams.snapshots import snapshots_url
from avcil_dist.streams.stream import scenario_of, shards_of, sole_writer, stream_url
from avcil_dist.streams.summary import is_committed
from avcil_dist.system.accelerator import name_accelerator
from avcil_dist.system.signals import StopRequest
from avcil_dist.system.source_version import source_version
from avcil_dist.training.build import build_networks, network_of_state
from avcil_dist.training.clip_cache_placement import place_clip_cache
from avcil_dist.training.clip_maps import region_shares
from avcil_dist.training.closed_form import solve_anchor, train_closed_form
from avcil_dist.training.collectives import decide_together, process_group
from avcil_dist.training.device import device_name, local_device, out_of_memory_as_line
from avcil_dist.training.engine import import_deepspeed, set_threads
from avcil_dist.training.evaluation import ScoredPredictions, evaluate_scores, validation_logits
from avcil_dist.training.exemplar_logits import store_logits, stored_rows
from avcil_dist.training.exemplars import exemplar_features, update_memory
from avcil_dist.training.failure_sync import Report, print_fault, propagate_failures
from avcil_dist.training.fault_log import FaultLog
from avcil_dist.training.incremental_step import Step, make_step
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.memory_use import memory_use
from avcil_dist.training.node_tensors import load_on_node
from avcil_dist.training.observer import Observer, ObserverList
from avcil_dist.training.rank_environment import set_deepspeed_variables, set_network_variables
from avcil_dist.training.sampling import training_sampler
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.training.system_metrics import observed_load
from avcil_dist.training.trainer import Trainer
from avcil_dist.training.training_state import BestEpoch
from avcil_dist.training.weights import gather_whole, whole_forms, whole_state
from avcil_dist.world import World

# Shards whose presence and size are checked before a step trains: none, where a preflight has just checked them;
# those of the step; or those of the whole stream.
ShardCheck = Literal["none", "step", "stream"]


def run_step(
    config: Config,
    number: int,
    *,
    world: World,
    observers: Sequence[Observer],
    stop: StopRequest,
    report: Report = print_fault,
    shard_check: ShardCheck = "step",
) -> StepArtifact | None:
    """Train, test and commit step `number`; every rank calls it. Returns the committed artifact.

    None, and nothing is changed, where the step is committed already: by a process that this one waited for.
    `shard_check` selects the shards whose presence and size rank 0 checks first, for all ranks.
    A step with a snapshot continues from its newest one. Raises StepStopped, on all ranks, when `stop` is set on one
    and a snapshot is committed. Raises an AvcilError, the same on all ranks, for faults in settings, data or
    artifacts; an error that a rank cannot raise is passed to `report`, and the process ends.
    """
    device = prepare_rank(config, number, world)
    set_threads(world)
    with (
        sole_writer(stream_url(config)) if world.is_main else nullcontext(),
        process_group(world, device, config.engine, trace_prefix(config, number)) as store,
        propagate_failures(store, world, report),
        observed_load(store, world, ObserverList(observers), config.tracking.system_seconds, _local_folder(config)),
        out_of_memory_as_line(),
    ):
        if decide_together(lambda: is_committed(stream_url(config), number)):
            ObserverList(observers).message("committed already, by another process")
            return None
        return step_in_group(
            config,
            number,
            world=world,
            observers=observers,
            device=device,
            stop=stop,
            shard_check=shard_check,
        )


def prepare_rank(config: Config, number: int, world: World) -> torch.device:
    """Set the environment of the libraries that train step `number`; import those that set it. Returns the device.

    `run_step` calls it too; a process that starts threads before that calls it first (see `system/variables.py`).
    Raises WorldError as `local_device` does, and ConfigError for settings that the method does not take.
    """
    device = local_device(world, config.engine.device)
    name_accelerator(device.type)
    set_network_variables(world, device, trace_prefix(config, number))
    set_deepspeed_variables(world, device)
    if make_method(config.method).needs.trains_at(number):
        import_deepspeed(world, device)
    return device


def _local_folder(config: Config) -> str:
    """A local folder whose disk the step uses."""
    return storage.local_path(stream_url(config)) or tempfile.gettempdir()


def step_in_group(
    config: Config,
    number: int,
    *,
    world: World,
    observers: Sequence[Observer],
    device: torch.device,
    stop: StopRequest,
    shard_check: ShardCheck = "step",
) -> StepArtifact:
    """`run_step` in an existing process group."""
    observer = ObserverList(observers)
    observer.message(f"device: {device_name(device)}; ranks: {world.size}; threads: {torch.get_num_threads()}")
    manifest = load_data(config.data)
    scenario = scenario_of(config, manifest)
    previous = _load_previous(config, manifest, number, world)
    _check_shards(manifest, scenario, number, shard_check)
    manifest = arrived(manifest, scenario, config.scenario, number)
    step = make_step(config, manifest, scenario, number, previous, world=world, device=device)
    memory = previous.memory if previous else EMPTY_MEMORY
    sampler = training_sampler(step, memory)
    inference = step.inference(_clip_cache(step, sampler, observer), FaultLog(observer, number).add)
    student, teacher = build_networks(step, previous, inference)
    previous = previous and replace(previous, model={})  # the networks have copies of the weights
    weights, stored, snapshots = _pretrained_weights(step, previous), stored_rows(step, previous), SnapshotManager(step)
    _begin_training(step, student, sampler, inference)
    if step.has_training:
        best, model = _train(Trainer(step, teacher, inference, sampler, snapshots, observer, stop, stored), student)
        student = network_of_state(step, model)
    else:
        observer.begin(number, 0, 0, 0)
        best, model = BestEpoch({}, epoch=0, val_accuracy=None), whole_state(student)
    if isinstance(step.method, ClosedFormMethod):
        best = replace(best, val_accuracy=train_closed_form(step, student, inference, observer.message))
    memory = update_memory(step, memory, student, inference)
    logits = store_logits(step, previous, memory, student, inference)
    step.method.end_step(exemplar_features(step, memory, student, inference) if step.needs.means else None)

    tested = evaluate_scores(step, student, "test", inference, observer)
    used, regions = memory_use(step, memory, model, logits), region_shares(step, student, inference)
    artifact = StepArtifact(
        step=number,
        model=model,
        method=step.method.state_dict(),
        memory=memory,
        scenario=scenario,
        metrics=_metrics(step, previous, tested, best, used, regions),
        config=config,
        manifest_hash=manifest.content_hash,
        device=device_name(device),
        ranks=world.size,
        seconds=snapshots.seconds,
        source=source_version() if world.is_main else "",
        weights=weights,
        exemplar_logits=logits,
    )
    decide_together(lambda: save_artifact(stream_url(config), artifact))
    observer.message(_last_line(artifact))
    snapshots.discard()
    return artifact


def _load_previous(config: Config, manifest: Manifest, number: int, world: World) -> StepArtifact | None:
    """The artifact that the step starts from, its weights once in the memory of each node; None at step 0."""
    previous = load_previous(config, manifest, number)
    if previous is None:
        return None
    return replace(previous, model=load_on_node(partial(load_model, stream_url(config), previous.step), world))


def _pretrained_weights(step: Step, previous: StepArtifact | None) -> Mapping[str, str]:
    """The sha256 of the weights that the encoders began with; a step that continues a network has its predecessor's."""
    if previous is not None and not step.needs.fresh_network:
        return previous.weights
    if not any(isinstance(encoder, TransformerConfig) for encoder in step.config.model.used):
        return {}
    from avcil_dist.models.encoders.weights import weights_digests  # imports the hub's client

    return decide_together(lambda: weights_digests(step.config.model))


def _begin_training(step: Step, student: Network, sampler: TrainingSampler, inference: InferencePass) -> None:
    """Solve the anchor if the method has one, and give the method the classes of a mean batch."""
    if step.method.anchor is not None:
        solve_anchor(step, student, inference)
    if step.has_training:
        counts = sampler.expected_counts(step.scenario.labels, step.context.num_seen)
        step.method.begin_training(torch.from_numpy(counts), sampler.batches_per_epoch)


def _train(trainer: Trainer, student: Network) -> tuple[BestEpoch, dict[str, Tensor]]:
    """Train the student. Returns the best epoch and the weights that the step commits, shared by a node's ranks."""
    step, forms = trainer.step, whole_forms(student)
    best = trainer.train(student)
    weights = gather_whole(best.parts, forms, step.device, step.world)
    return best, _committed_weights(step, weights, trainer.inference)


def _committed_weights(step: Step, best: dict[str, Tensor], inference: InferencePass) -> dict[str, Tensor]:
    """The weights that the step commits: those of the best epoch, adapters merged, as the method changes them."""
    calibration: list[float] = []
    if step.needs.calibration and step.context.num_old:
        logits, labels = validation_logits(step, network_of_state(step, best), inference)
        # Rank 0 decides: the last digits of a sum may differ between types of machine.
        calibration = decide_together(lambda: step.method.calibrate(logits, labels))
    return step.method.committed_weights(merge_adapters(best), calibration)


def _last_line(artifact: StepArtifact) -> str:
    """The results of a step in one line."""
    metrics = artifact.metrics
    forgotten = f", forgetting {metrics.forgetting[-1]:.1%}" if metrics.forgetting else ""
    time = datetime.timedelta(seconds=round(artifact.seconds))
    return f"step {artifact.step}: test accuracy {metrics.seen_accuracy[-1]:.1%}{forgotten}, time {time}"


def trace_prefix(config: Config, number: int) -> str:
    """The path of NCCL's traces of a step, without the rank: beside the folder of the stream's snapshots."""
    return storage.join(
        storage.parent(storage.parent(snapshots_url(config, number))), f"nccl_trace_step_{number:03d}_rank_"
    )


def _check_shards(manifest: Manifest, scenario: Scenario, number: int, check: ShardCheck) -> None:
    """Rank 0 checks the shards; all ranks raise its DataError."""
    if check != "none":
        last = number if check == "step" else scenario.num_steps - 1
        decide_together(lambda: check_shards(manifest, shards_of(manifest, scenario, last)))


def _clip_cache(step: Step, sampler: TrainingSampler, observer: Observer) -> ClipCache | None:
    """Make the cache of the clips that are read once an epoch: training clips without augmentation, validation clips.

    None where the step does not train.
    """
    if not step.has_training:
        return None
    clips = NO_CLIPS
    if step.config.data.clip_cache != "none":  # otherwise not even a list of the clips, of which there may be millions
        if not step.config.data.augment.is_on:
            clips = sampler.clips
        if step.config.optim.keep_epoch == "best_val" or step.needs.validation:
            clips = np.union1d(clips, step.manifest.clips(step.seen_classes, "val"))
    cache, description = place_clip_cache(step.manifest, step.config.data, clips, step.world, step.device, step.inputs)
    observer.message(description)
    return cache


def _metrics(
    step: Step,
    previous: StepArtifact | None,
    tested: ScoredPredictions,
    best: BestEpoch,
    memory: MemoryUse,
    regions: RegionShares | None,
) -> StreamMetrics:
    labels, predictions = tested.labels, tested.predictions
    disjoint = None
    if step.config.data.source_disjoint:
        rows = source_disjoint(step.manifest, step.scenario.classes, tested.clips)
        disjoint = seen_accuracy(labels[rows], predictions[rows]), int(rows.sum())
    return StreamMetrics.after(
        previous.metrics if previous else None,
        step=step.number,
        row=accuracy_row(labels, predictions, step.scenario.head_slices(step.number)),
        seen=seen_accuracy(labels, predictions),
        per_class=per_class_accuracy(labels, predictions, step.seen_classes),
        num_test_clips=len(labels),
        epoch=best.epoch,
        val_accuracy=best.val_accuracy,
        num_epochs=best.num_epochs,
        num_ties=best.num_ties,
        confusion=confusion(labels, predictions, step.seen_classes),
        source_disjoint=disjoint,
        memory=memory,
        epochs=best.epochs,
        scores=score_metrics(labels, tested.scores, step.scenario.head_slices(step.number)),
        regions=regions,
    )
