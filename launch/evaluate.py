"""Evaluates a committed step once more, from its artifact and shards alone."""

import os
from dataclasses import replace
from typing import Any, cast

from avcil_dist import storage
from avcil_dist.data.manifest import Split, check_shards, load_manifest
from avcil_dist.errors import ArtifactError
from avcil_dist.streams.artifact import committed_steps, load_artifact, step_url
from avcil_dist.streams.metrics import accuracy_row, per_class_accuracy, seen_accuracy
from avcil_dist.training.build import restored
from avcil_dist.training.collectives import local_device, process_group
from avcil_dist.training.engine import set_threads
from avcil_dist.training.evaluation import Evaluator
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.world import world_from_environment
from launch.local import local_worlds


def evaluate_stream(stream: str, step: int | None, split: str, manifest_url: str | None) -> dict[str, Any]:
    """Predict every clip of a split with a step's weights; accuracies over the classes seen then.

    Raises ArtifactError when the stream has no such step, DataError for missing shards.
    """
    artifact = load_artifact(stream, _last_step(stream) if step is None else step)
    config, scenario = artifact.config, artifact.scenario
    manifest = load_manifest(manifest_url or config.data.manifest)
    seen = scenario.seen(artifact.step)
    check_shards(manifest, manifest.shard_numbers(seen, cast(Split, split)))
    world = world_from_environment(os.environ)
    if world.launcher == "none":
        world = replace(local_worlds(1)[0], launcher="none")
    device = local_device(world)
    set_threads(world)
    with process_group(world, device, config.engine.timeout_minutes):
        network, method = restored(artifact, manifest.shape, step_url(stream, artifact.step))
        network.to(device)
        evaluator = Evaluator(
            InferencePass(manifest, scenario, config.data, world, device), config.optim.global_eval_batch
        )
        found = evaluator(network, method, cast(Split, split), artifact.step, on_batch=lambda: None)
    return {
        "stream": stream,
        "step": artifact.step,
        "split": split,
        "num_clips": len(found.labels),
        "seen_accuracy": seen_accuracy(found.labels, found.predictions),
        "task_accuracy": accuracy_row(found.labels, found.predictions, scenario.head_slices(artifact.step)),
        "per_class": per_class_accuracy(found.labels, found.predictions, seen),
    }


def _last_step(stream: str) -> int:
    steps = committed_steps(stream)
    if not steps:
        raise ArtifactError(f"{storage.join(stream, 'step_000')}: no committed step artifact; train the stream first")
    return steps[-1]
