"""Methods of other packages: sampling weights, prompts of their own, and the documents that show them."""

import inspect
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig, DataConfig, MethodConfig
from avcil_dist.data.clip_weights import ClipWeights, draw
from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.data.plan import NO_CLIPS, plan_epoch, plan_replay
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.errors import ConfigError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Method, Needs, SamplingWeights, StepContext, Targets
from avcil_dist.models.network import HeadedNetwork, build_network
from avcil_dist.scenario import Scenario
from avcil_dist.system.plugins import trust
from avcil_dist.training.sampling import training_sampler
from avcil_dist.world import World
from tests.helpers import foreign_methods
from tests.helpers.documents import PROJECT, blocks
from tests.unit.test_plan import make_manifest

MODULE = "tests.helpers.foreign_methods"
ONE = World(rank=0, size=1, local_rank=0, local_size=1)


def method_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setenv("AVCIL_PLUGINS", "")
    trust(f"{MODULE}:{name}")
    return make_method(MethodConfig(name=f"{MODULE}:{name}"))


def test_the_documents_show_the_code_that_is_tested() -> None:
    shown = "\n".join(block.text for block in blocks(PROJECT / "docs" / "extending.md"))
    for kind in (foreign_methods.BalancedReplay, foreign_methods.PromptPool, foreign_methods.LearningToPrompt):
        assert inspect.getsource(kind) in shown


def test_clips_are_drawn_in_proportion_to_their_weights() -> None:
    random = np.random.default_rng(0)
    weights = np.array([0, 1, 2, 0.5, 0, 4.5, 0])
    total = Counter[int]()
    for _ in range(400):
        drawn = draw(weights, random)
        assert len(drawn) == 7
        assert (np.diff(drawn) >= 0).all()
        counts = np.bincount(drawn, minlength=7)
        assert (abs(counts - 7 * weights / 8) < 1).all()
        total.update(drawn.tolist())
    assert [total[number] / 400 for number in range(7)] == pytest.approx(7 * weights / 8, abs=0.06)
    assert draw(np.array([0.0, 0, 5]), random).tolist() == [2, 2, 2]
    assert draw(np.zeros(3), random).tolist() == [0, 1, 2]
    assert draw(np.zeros(0), random).tolist() == []


def test_a_plan_with_weights_is_equal_on_any_number_of_ranks_and_reads_the_same_parts() -> None:
    manifest = make_manifest([[30, 20], [10], [40, 20]])
    exemplars = manifest.clips(["c0"], "train")[[3, 40, 7]]
    weights = ClipWeights.of(
        np.array([{"c1": 3.0, "c2": 1.0}.get(shard.class_name, 0.0) for shard in manifest.shards]),
        exemplars,
        np.array([10.0, 0.0, 20.0]),
    )
    plan: dict[str, Any] = {"seed": 1, "step": 1, "global_batch": 8, "canonical_nodes": 2, "window": 2}
    plan |= {"exemplars": exemplars, "weights": weights}
    found = Counter[str]()
    for epoch in range(50):
        whole = plan_epoch(manifest, ["c1", "c2"], epoch=epoch, **plan)
        assert whole.batches.size + whole.rest.size == 73
        parts = [
            plan_epoch(manifest, ["c1", "c2"], epoch=epoch, columns=range(first, first + 2), **plan).batches
            for first in range(0, 8, 2)
        ]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole.batches)
        whole = plan_epoch(manifest, ["c1", "c2"], epoch=epoch, **(plan | {"canonical_nodes": 1}))
        clips = [*whole.batches.ravel().tolist(), *whole.rest.tolist()]
        assert exemplars[1] not in clips
        found.update("exemplar" if clip in exemplars else manifest.class_of(clip) for clip in clips)
    # of 10 · 3, 60 · 1 and 30
    drawn = [found[name] / sum(found.values()) for name in ("c1", "c2", "exemplar")]
    assert drawn == pytest.approx([0.25, 0.5, 0.25], abs=0.01)


def test_replay_with_weights_is_resumed_in_its_middle() -> None:
    exemplars, weights = np.arange(5) * 10, np.array([1.0, 1, 1, 1, 6])
    span: dict[str, Any] = {"seed": 0, "step": 1, "global_batch": 4, "weights": weights}
    whole = plan_replay(exemplars, first=0, count=50, **span)
    np.testing.assert_array_equal(plan_replay(exemplars, first=20, count=30, **span), whole[20:])
    assert (whole == 40).mean() == pytest.approx(0.6, abs=0.02)


class Step(SimpleNamespace):
    """What a sampler reads of a step."""


def make_step(method: Any, needs: Needs) -> Any:
    manifest = make_manifest([[12], [6, 6], [18]])
    scenario = Scenario((("c0", "c1"), ("c2",)))
    config = SimpleNamespace(
        data=DataConfig(manifest="unused"),
        optim=OptimConfig(global_batch=6, global_replay_batch=6, epochs=40),
        seed=0,
        method=MethodConfig(name="mine"),
    )
    return Step(
        manifest=manifest,
        scenario=scenario,
        number=1,
        needs=needs,
        method=method,
        config=config,
        world=ONE,
        has_training=True,
        late_clips=NO_CLIPS,
        seen_classes=scenario.seen(1),
        new_classes=scenario.new(1),
        context=StepContext(scenario, 1),
    )


MEMORY = ExemplarMemory({"c0": ("k0_0_4", "k0_0_2"), "c1": ("k1_1_0",)})


def shares(sampler: TrainingSampler) -> dict[str, float]:
    clips = np.concatenate([request.clips for request in sampler])
    keys = [sampler.manifest.key(int(clip)) for clip in clips]
    return {key: count / len(keys) for key, count in Counter(keys).items()}


@pytest.mark.usefixtures("one_rank")
def test_a_methods_weights_reach_current_clips_and_exemplars(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of("BalancedReplay", monkeypatch)
    sampler = training_sampler(make_step(method, method.needs), MEMORY)
    found = shares(sampler)
    # a third for each class; of the exemplars of c0, 1 and 1/2
    expected = {"k0_0_4": 2 / 9, "k0_0_2": 1 / 9, "k1_1_0": 1 / 3}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=0.03)
    assert sampler.expected_counts({"c0": 0, "c1": 1, "c2": 2}, 3) == pytest.approx([2, 2, 2])
    replayed = training_sampler(make_step(method, Needs(memory="replay", weighted_sampling=True)), MEMORY)
    assert len(replayed.exemplars) == 3
    found = shares(replayed)
    assert {key: found[key] for key in expected} == pytest.approx(
        {"k0_0_4": 1 / 6, "k0_0_2": 1 / 12, "k1_1_0": 0.25}, abs=0.02
    )


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("weights", "words"),
    [
        (
            SamplingWeights([1.0] * 2, [[1.0, 1.0], [1.0], []]),
            r"2 weights of classes and \[2, 1, 0\] of exemplars, not 3",
        ),
        (SamplingWeights([1.0] * 3, [[1.0], [1.0], []]), r"not 3 and \[2, 1, 0\]"),
        (SamplingWeights([1.0, -1.0, 1.0], [[1.0, 1.0], [1.0], []]), "returned -1.0"),
        (SamplingWeights([1.0] * 3, [[1.0, math.nan], [1.0], []]), "returned nan"),
        (SamplingWeights([0.0] * 3, [[0.0, 0.0], [0.0], []]), "zeros alone"),
    ],
)
def test_weights_that_are_no_frequencies_are_refused(weights: SamplingWeights, words: str) -> None:
    method = SimpleNamespace(sampling_weights=lambda current, exemplars: weights)
    with pytest.raises(ConfigError, match=words):
        training_sampler(make_step(method, Needs(memory="join", weighted_sampling=True)), MEMORY)


def test_each_clip_takes_the_prompts_with_the_closest_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    method = method_of("LearningToPrompt", monkeypatch)
    features = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}}
    shape = {"frames": 2, "positions": 3, "dim": 8}
    made = build_network(
        ModelConfig.model_validate(features), ClipConfig(), shape, 2, network_spec=method.needs.network_spec
    )
    assert isinstance(made, HeadedNetwork)
    scenario = Scenario((("a", "b"), ("c", "d")))
    made.grow(4)
    method.begin_step(StepContext(scenario, 1))
    trained = {name.split(".")[0] for name, value in made.named_parameters() if value.requires_grad}
    assert trained == {"extension", "classifier"}
    pool: Any = made.extension
    with torch.no_grad():
        pool.keys.copy_(torch.eye(8))
    tokens = torch.zeros(2, 2, 3, 8)
    tokens[0, ..., :3], tokens[1, ..., 5:] = torch.tensor([3.0, 2, 1]), torch.tensor([1.0, 2, 3])
    output = made(tokens, torch.randn(2, 8))
    assert output.auxiliary.shape == (2, 3)
    torch.testing.assert_close(output.auxiliary[0], torch.tensor([3.0, 2, 1]) / math.sqrt(14))
    losses = method.loss(Targets(torch.tensor([2, 2]), 2), output, None)
    losses["loss"].backward()
    assert pool.prompts.grad.abs().sum(dim=(1, 2)).bool().tolist() == [True] * 3 + [False] * 2 + [True] * 3
    assert losses["similarity"].item() == pytest.approx(output.auxiliary.mean().item())
