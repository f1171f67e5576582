"""One incremental step: from the artifact of the step before to this step's artifact.

The same code runs in one process on a laptop, under torchrun and in a SLURM job. The
loop itself is `trainer.py`.
"""

import numpy as np
import torch

from avcil_dist.config import Config
from avcil_dist.data.loader import TrainingSource
from avcil_dist.data.manifest import Manifest, check_shards, load_manifest
from avcil_dist.data.memory import EMPTY_MEMORY, Memory
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.network import AudioVisualNetwork, build_network
from avcil_dist.seeds import derive_seed
from avcil_dist.training.artifact import StepArtifact, save_artifact
from avcil_dist.training.distributed import (
    decide_together,
    local_device,
    process_group,
)
from avcil_dist.training.engine import set_threads
from avcil_dist.training.evaluate import Evaluator, Predictions
from avcil_dist.training.metrics import StreamMetrics, accuracy_row, per_class_accuracy, seen_accuracy
from avcil_dist.training.stream import load_previous, scenario_of, shards_of, stream_url
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.trainer import Observer, Selected, Trainer
from avcil_dist.world import World


def run_step(config: Config, step: int, *, world: World, observer: Observer) -> StepArtifact:
    """Train, test and commit one step; every rank calls it. Returns what was committed.

    Raises an AvcilError, the same on all ranks, for faults in settings, data or artifacts.
    """
    device = local_device(world)
    set_threads(world)
    with process_group(world, device, config.engine.timeout_minutes):
        manifest = load_manifest(config.data.manifest)
        scenario = scenario_of(config, manifest)
        previous = load_previous(config, manifest, step)
        decide_together(lambda: check_shards(manifest, shards_of(manifest, scenario, step)))

        method = make_method(config.method)
        method.load_state_dict(previous.method if previous else {})
        context = StepContext(scenario, step)
        method.begin_step(context)
        student, teacher = _make_networks(config, manifest, context, method, previous, device)
        memory = previous.memory if previous else EMPTY_MEMORY
        exemplars = _exemplars(manifest, memory) if method.needs.replay else np.empty(0, dtype=np.int64)
        source = _training_source(config, manifest, context, method, exemplars, world)
        evaluator = Evaluator(manifest, scenario, config.data, config.optim.eval_batch, world, device)

        trainer = Trainer(config, method, teacher, evaluator, source, observer, device)
        selected = trainer.train(student)
        method.end_step(context)

        result = build_network(config.model, config.data.clip, manifest.shape, scenario.num_seen(step)).to(device)
        result.load_state_dict(selected.state)
        tested = evaluator(result, method, "test", step, on_batch=observer.advance)
        artifact = StepArtifact(
            step=step,
            model=selected.state,
            method=method.state_dict(),
            memory=_updated_memory(config, manifest, context, method, memory),
            scenario=scenario,
            metrics=_metrics(previous, context, tested, selected),
            config=config,
            manifest_hash=manifest.content_hash,
        )
        decide_together(lambda: save_artifact(stream_url(config), artifact))
        return artifact


def _make_networks(
    config: Config,
    manifest: Manifest,
    context: StepContext,
    method: Method,
    previous: StepArtifact | None,
    device: torch.device,
) -> tuple[AudioVisualNetwork, Teacher | None]:
    """The student, its head grown, and the teacher where the method has one."""

    def build(num_classes: int) -> AudioVisualNetwork:
        return build_network(config.model, config.data.clip, manifest.shape, num_classes)

    torch.manual_seed(derive_seed(config.seed, "weights", context.step))
    num_seen = context.scenario.num_seen(context.step)
    if previous is None:
        return build(num_seen), None
    teacher = Teacher(build(context.num_old), previous.model, device) if method.needs.teacher else None
    if method.needs.fresh_network:
        return build(num_seen), teacher
    student = build(context.num_old)
    student.load_state_dict(previous.model)
    student.grow(num_seen)
    return student, teacher


def _exemplars(manifest: Manifest, memory: Memory) -> np.ndarray:
    numbers = [manifest.clip_numbers(name, keys) for name, keys in memory.keys.items()]
    return np.concatenate([np.empty(0, dtype=np.int64), *numbers])


def _training_source(
    config: Config, manifest: Manifest, context: StepContext, method: Method, exemplars: np.ndarray, world: World
) -> TrainingSource:
    scenario, step = context.scenario, context.step
    return TrainingSource(
        manifest=manifest,
        classes=scenario.seen(step) if method.needs.all_data else scenario.new(step),
        exemplars=exemplars,
        data=config.data,
        optim=config.optim,
        seed=config.seed,
        step=step,
        world=world,
    )


def _updated_memory(config: Config, manifest: Manifest, context: StepContext, method: Method, memory: Memory) -> Memory:
    if not method.needs.replay:
        return memory
    new = context.scenario.new(context.step)
    candidates = {name: [manifest.key(clip) for clip in manifest.clips([name], "train")] for name in new}
    return memory.update(candidates, config.memory.size, config.seed)


def _metrics(
    previous: StepArtifact | None, context: StepContext, tested: Predictions, selected: Selected
) -> StreamMetrics:
    labels, predictions = tested.labels, tested.predictions
    return StreamMetrics.after(
        previous.metrics if previous else None,
        step=context.step,
        row=accuracy_row(labels, predictions, context.scenario.head_slices(context.step)),
        seen=seen_accuracy(labels, predictions),
        per_class=per_class_accuracy(labels, predictions, context.scenario.seen(context.step)),
        num_test_clips=len(labels),
        epoch=selected.epoch,
        val_accuracy=selected.val_accuracy,
    )
