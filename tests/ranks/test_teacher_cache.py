"""What the teacher said once is what it would say to each batch, on any number of ranks."""

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
from avcil_dist.training.teacher_cache import PARTS, TeacherCache, build_teacher_cache
from avcil_dist.world import World
from tests.helpers.features import damage, make_feature_shards
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.streams import write_config

CLIPS, OLD, SEEN = 100, 3, 5  # of a class: more than a pass sees at a time, and no multiple of it
DAMAGED = "train-004-00007"
METHODS = ("avcil", "afc")


def said(world: World, configs: Mapping[str, Config]) -> dict[str, tuple[dict[str, np.ndarray], float]]:
    """By method: what is kept of the teacher's answers, and how far they are from its answers to training batches."""
    return {name: said_by(world, config) for name, config in configs.items()}


def said_by(world: World, config: Config) -> tuple[dict[str, np.ndarray], float]:
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
    features = InferencePass(manifest, scenario, config.data, world, CPU)
    num_asked = [0]
    answers = build_teacher_cache(
        lambda batch: teacher.output(batch, method),
        features,
        source.clips,
        between=lambda: num_asked.append(num_asked.pop() + 1),
    )
    assert num_asked == [-(-len(source.clips) // (64 * world.size))]
    state = answers.to_state(manifest)
    again = TeacherCache.from_state(state, source.clips, manifest)
    assert again is not None
    assert TeacherCache.from_state(state, source.clips[1:], manifest) is None
    return parts_of(again), distance(teacher, again, source, method, scenario.labels)


def distance(
    teacher: Teacher, answers: TeacherCache, source: TrainingSampler, method: Method, labels: Mapping[str, int]
) -> float:
    """The largest difference between what was and what is said, over two epochs; damaged rows are damaged in both."""
    furthest = 0.0
    source = replace(source, optim=source.optim.model_copy(update={"epochs": 2}))
    for batch in load_batches(source, manifest=source.manifest, labels=labels, data=source.data):
        asked, looked_up = teacher.output(batch, method), answers.lookup(batch.clips, CPU)
        assert answers.mask_missing(batch, source.manifest) is batch
        good = batch.valid
        for now, then in zip(asked.tensors(), looked_up.tensors(), strict=True):
            furthest = max(furthest, float((now[good] - then[good]).abs().max()))
    unheard = replace(answers, valid=np.zeros_like(answers.valid)).mask_missing(batch, source.manifest)
    assert not unheard.valid.any()
    assert len(unheard.faults) == int(batch.valid.sum()) + len(batch.faults)
    return furthest


def parts_of(answers: TeacherCache) -> dict[str, np.ndarray]:
    parts = {name: getattr(answers.output, name) for name in PARTS}
    return {name: part.numpy() for name, part in parts.items() if part is not None} | {"valid": answers.valid}


def test_what_is_looked_up_is_what_would_be_said_on_any_number_of_ranks(tmp_path: Path) -> None:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": CLIPS, "val": 6, "test": 6})
    damage(tmp_path / "shards", DAMAGED)
    path = str(write_config(tmp_path))
    configs = {name: load_config(path, [f"method={name}", "data.max_bad_fraction=0.1"]) for name in METHODS}
    [one] = run_ranks(said, 1, configs)
    assert set(one["avcil"][0]) == {"logits", "valid"}
    assert set(one["afc"][0]) == {*PARTS, "valid"}
    for found in (one, *run_ranks(said, 2, configs)):
        for name, (parts, furthest) in found.items():
            assert furthest < 1e-5
            assert parts["valid"].sum() == 2 * CLIPS + 3 - 1
            assert parts.keys() == one[name][0].keys()
            for part, values in parts.items():
                np.testing.assert_allclose(values, one[name][0][part], rtol=0, atol=1e-6)
