"""The teacher cache holds what the teacher returns for each training batch, on any number of ranks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, StepContext
from avcil_dist.models.heads import ProxyHead
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.inference_pass import InferencePass
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache, build_teacher_cache
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.features import damage
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

CLIPS, OLD, SEEN = 100, 3, 5  # clips of a class: more than a pass has in a batch, and no multiple of it
DAMAGED = "train-004-00007"
FIELDS = {"avcil": {"logits"}, "afc": {"logits", "audio", "visual", "pooled", "importance"}}


def caches(world: World, configs: Mapping[str, Config]) -> dict[str, tuple[dict[str, np.ndarray], float]]:
    """By method: the tensors of the cache, and their largest distance from the teacher's outputs for batches."""
    return {name: cache_of(world, config) for name, config in configs.items()}


def cache_of(world: World, config: Config) -> tuple[dict[str, np.ndarray], float]:
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    method = make_method(config.method)
    method.begin_step(StepContext(scenario, 1))
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, manifest.shape, OLD, network_spec=method.needs.network_spec)
    assert isinstance(network, HeadedNetwork)
    teacher = Teacher(network, CPU)
    if isinstance(network.classifier, ProxyHead):
        teacher.grow(SEEN, torch.randn(method.options.num_proxies * (SEEN - OLD), network.visual_proj.out_features))
    exemplars = manifest.clips(["class_000"], "train")[[40, 3, 7]]
    source = TrainingSampler(
        manifest=manifest,
        classes=scenario.new(1),
        exemplars=exemplars,
        data=config.data,
        optim=config.optim,
        seed=0,
        step=1,
        world=world,
    )
    inference = InferencePass(manifest, scenario, config.data, world, CPU)
    num_batches = [0]
    cache = build_teacher_cache(
        lambda batch: teacher.output(batch, method),
        inference,
        source.clips,
        after_batch=lambda: num_batches.append(num_batches.pop() + 1),
    )
    assert num_batches == [-(-len(source.clips) // (64 * world.size))]
    state = cache.to_state(manifest)
    loaded = TeacherCache.from_state(state, source.clips, manifest)
    assert loaded is not None
    assert TeacherCache.from_state(state, source.clips[1:], manifest) is None
    furthest = distance(teacher, loaded, source, method, scenario.labels)
    check_use(teacher, loaded, source, method, scenario.labels)
    return tensors_of(loaded), furthest


def distance(
    teacher: Teacher, cache: TeacherCache, source: TrainingSampler, method: Method, labels: Mapping[str, int]
) -> float:
    """The largest difference between cached and computed outputs over two epochs; damaged rows are left out."""
    furthest = 0.0
    source = replace(source, optim=source.optim.model_copy(update={"epochs": 2}))
    for batch in load_batches(source, manifest=source.manifest, labels=labels, data=source.data):
        computed, cached = teacher.output(batch, method), cache.lookup(batch.clips, CPU)
        assert cache.mask_missing(batch, source.manifest) is batch
        good = batch.valid
        for one, other in zip(computed.tensors(), cached.tensors(), strict=True):
            furthest = max(furthest, float((one[good] - other[good]).abs().max()))
    return furthest


def check_use(
    teacher: Teacher, cache: TeacherCache, source: TrainingSampler, method: Method, labels: Mapping[str, int]
) -> None:
    """A clip without an output is masked and named; a teacher with a cache does not run its network."""
    batch = next(load_batches(source, manifest=source.manifest, labels=labels, data=source.data))
    clip = int(batch.clips[batch.valid.numpy()][-1])
    masked = replace(cache, valid=cache.valid & (cache.clips != clip)).mask_missing(batch, source.manifest)
    assert torch.equal(masked.valid, batch.valid & torch.from_numpy(batch.clips != clip))
    assert len(masked.faults) == len(batch.faults) + int((batch.clips == clip).sum())
    assert masked.faults[-1] == f"{source.manifest.key(clip)}: could not be read for the teacher cache"
    nothing = replace(cache, valid=np.zeros_like(cache.valid)).mask_missing(batch, source.manifest)
    assert not nothing.valid.any()
    assert len(nothing.faults) == int(batch.valid.sum()) + len(batch.faults)
    teacher.use_cache(cache)
    runs: list[None] = []
    teacher.network.register_forward_hook(lambda *_: runs.append(None))
    assert torch.equal(teacher.output(batch, method).logits, cache.lookup(batch.clips, CPU).logits)
    assert not runs


def tensors_of(cache: TeacherCache) -> dict[str, np.ndarray]:
    fields = {name: field.numpy() for name, field in cache.output._asdict().items() if field is not None}
    return fields | {"valid": cache.valid}


def test_a_cached_output_is_the_computed_one_on_any_number_of_ranks(tmp_path: Path) -> None:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": CLIPS, "val": 6, "test": 6})
    damage(tmp_path / "shards", DAMAGED)
    path = str(write_config(tmp_path))
    configs = {name: load_config(path, [f"method={name}", "data.max_bad_fraction=0.1"]) for name in FIELDS}
    [one] = run_ranks(caches, 1, configs)
    for name, fields in FIELDS.items():
        assert set(one[name][0]) == {*fields, "valid"}
    for found in (one, *run_ranks(caches, 2, configs)):
        for name, (tensors, furthest) in found.items():
            assert furthest < 1e-5
            assert tensors["valid"].sum() == 2 * CLIPS + 3 - 1
            assert tensors.keys() == one[name][0].keys()
            for field, values in tensors.items():
                np.testing.assert_allclose(values, one[name][0][field], rtol=0, atol=1e-6)
