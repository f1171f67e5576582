"""Optimizer: learning rate of each parameter, and the loss scale of fp16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.errors import ConfigError
from avcil_dist.models.network import Network, build_network
from avcil_dist.training.optim import LossScale, build_optimizer, lr_factor, parameter_groups

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
TINY = {"weights": "random", "dim": 24, "depth": 3, "heads": 2}
FULL, PARTIAL, FROZEN = {"train": "full"}, {"train": "partial", "last_blocks": 2}, {"train": "frozen"}


def make_network(visual: dict[str, object], audio: dict[str, object]) -> Network:
    config = {"visual": {"kind": "videomae", **TINY, **visual}, "audio": {"kind": "audiomae", **TINY, **audio}}
    return build_network(ModelConfig.model_validate(config), CLIP, {}, num_classes=3)


def rates(network: Network, optim: OptimConfig) -> dict[str, float]:
    """The learning rate of each trained parameter by name; each is in exactly one group."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    found = [
        (names[parameter], group["lr"]) for group in parameter_groups(network, optim) for parameter in group["params"]
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.parametrize(("visual", "audio"), [(FULL, FULL), (PARTIAL, FULL), (FROZEN, PARTIAL), (FULL, FROZEN)])
def test_every_trained_parameter_is_in_one_group_and_no_other_is(visual: dict, audio: dict) -> None:
    network = make_network(visual, audio)
    expected = {name for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert rates(network, OptimConfig(layer_decay=0.5)).keys() == expected


def test_the_rate_decays_from_block_to_block_down_to_the_patches() -> None:
    found = rates(make_network(FULL, FULL), OptimConfig(lr=1.0, layer_decay=0.5))
    by_prefix = {
        "classifier.": 1.0,
        "attention.": 1.0,
        "visual_proj.": 1.0,
        "visual_encoder.body.layernorm.": 1.0,
        "visual_encoder.body.encoder.layer.2.": 0.5,
        "visual_encoder.body.encoder.layer.1.": 0.25,
        "visual_encoder.body.encoder.layer.0.": 0.125,
        "visual_encoder.body.embeddings.": 0.0625,
        "audio_encoder.body.norm.": 1.0,
        "audio_encoder.body.blocks.2.": 0.5,
        "audio_encoder.body.blocks.0.": 0.125,
        "audio_encoder.body.cls_token": 0.0625,
        "audio_encoder.body.pos_embed": 0.0625,
        "audio_encoder.body.patch_embed.": 0.0625,
    }
    for prefix, rate in by_prefix.items():
        under = {value for name, value in found.items() if name.startswith(prefix)}
        assert under == {rate}, prefix


def test_without_decay_there_is_one_group_in_the_networks_order() -> None:
    network = make_network(FULL, PARTIAL)
    [group] = parameter_groups(network, OptimConfig(lr=0.01))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    assert group["lr"] == 0.01
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in trained]


def test_a_step_of_sgd_moves_each_parameter_by_its_own_rate() -> None:
    network, optim = make_network(FULL, FROZEN), OptimConfig(lr=0.1, layer_decay=0.5)
    expected = rates(network, optim)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(parameter_groups(network, optim))
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(before[name] - value, torch.full_like(value, expected.get(name, 0.0)))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["optim.layer_decay=0.7"], "optim.layer_decay=0.7 needs a trained transformer, and none is trained"),
        (["optim.layer_decay=1.5"], "optim.layer_decay: 1.5: Input should be less than or equal to 1"),
        (["optim.layer_decay=0"], "optim.layer_decay: 0: Input should be greater than 0"),
    ],
)
def test_a_decay_without_layers_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config("demo", words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"train": "partial"}, "set both, or neither"),
        ({"train": "full", "last_blocks": 1}, "set both, or neither"),
        ({"last_blocks": 1}, "set both, or neither"),
        ({"train": "partial", "last_blocks": 13}, "last_blocks=13 is more than depth=12"),
        ({"train": "partial", "last_blocks": 0}, "Input should be greater than 0"),
        ({"train": "half"}, "Input should be 'frozen', 'partial', 'adapters' or 'full'"),
        ({"train": "adapters"}, "set both, or neither"),
        ({"train": "full", "adapter_rank": 4}, "set both, or neither"),
        ({"train": "adapters", "adapter_rank": 769}, "adapter_rank=769 is more than dim=768"),
        ({"frozen": True}, "frozen: unknown key"),
    ],
)
def test_what_trains_nothing_or_too_much_is_refused_in_one_line(words: dict[str, object], said: str) -> None:
    section = {"kind": "videomae", "weights": "random"} | words
    with pytest.raises(ConfigError) as raised:
        load_config("demo", [f"model.visual={section}"])
    assert "\n" not in str(raised.value)
    assert said in str(raised.value)


def test_the_decay_of_one_modality_counts_that_encoder_alone() -> None:
    words = ["model.modality=audio", "method=finetune", "optim.layer_decay=0.7"]
    trained = "{kind: videomae, weights: random, train: full}"
    with pytest.raises(ConfigError, match="none is trained"):
        load_config("demo", [*words, f"model.visual={trained}"])
    made = load_config("demo", [*words, f"model.audio={trained.replace('video', 'audio')}"])
    assert made.optim.layer_decay == 0.7


def test_the_optimizer_is_adam_with_the_settings_of_the_configuration() -> None:
    network = make_network(FULL, FROZEN)
    optimizer = build_optimizer(network, OptimConfig(lr=0.01, weight_decay=0.5))
    assert isinstance(optimizer, torch.optim.Adam)
    [group] = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"], group["amsgrad"]) == (0.01, 0.5, (0.9, 0.999), False)


def test_the_loss_scale_doubles_after_2000_steps_without_overflow_and_counts_anew() -> None:
    scale = LossScale()
    for _ in range(1999):
        scale.update(overflowed=False)
    assert (scale.value, scale.num_good) == (2.0**16, 1999)
    scale.update(overflowed=False)
    assert (scale.value, scale.num_good) == (2.0**17, 0)
    scale.update(overflowed=False)
    assert (scale.value, scale.num_good) == (2.0**17, 1)


def test_an_overflow_halves_the_loss_scale_down_to_one() -> None:
    scale = LossScale(num_good=1999)
    scale.update(overflowed=True)
    assert (scale.value, scale.num_good) == (2.0**15, 0)
    for _ in range(15):
        assert not scale.is_smallest
        scale.update(overflowed=True)
    assert (scale.value, scale.is_smallest) == (1.0, True)
    scale.update(overflowed=True)
    assert scale.value == 1.0


PER_EPOCH = 5


@pytest.mark.parametrize(
    ("words", "reference"),
    [
        ({"schedule": "constant"}, lambda made: torch.optim.lr_scheduler.ConstantLR(made, factor=1.0)),
        (
            {"schedule": "cosine", "final_lr_fraction": 0.1},
            lambda made: torch.optim.lr_scheduler.CosineAnnealingLR(made, T_max=8 * PER_EPOCH, eta_min=0.1),
        ),
        (
            {"schedule": "linear"},
            lambda made: torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.0, total_iters=8 * PER_EPOCH),
        ),
        (
            {"schedule": "multistep", "milestones": [3, 6], "lr_drop": 0.5},
            lambda made: torch.optim.lr_scheduler.MultiStepLR(made, [3 * PER_EPOCH, 6 * PER_EPOCH], gamma=0.5),
        ),
    ],
)
def test_a_schedule_is_that_of_torch(words: dict, reference: Callable[[torch.optim.Optimizer], Any]) -> None:
    made = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = reference(made)
    optim = OptimConfig.model_validate({"epochs": 8} | words)
    for iteration in range(8 * PER_EPOCH):
        assert lr_factor(optim, iteration, PER_EPOCH) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-9)
        made.step()
        scheduler.step()


def test_a_warm_up_ascends_to_the_whole_rate_and_the_schedule_follows() -> None:
    optim = OptimConfig(epochs=3, warmup_epochs=0.8, schedule="linear", final_lr_fraction=0.5)
    found = [lr_factor(optim, iteration, PER_EPOCH) for iteration in range(3 * PER_EPOCH)]
    assert found[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert found[5] - found[6] == pytest.approx(0.5 / 11)
    assert found[-1] == pytest.approx(0.5 + 0.5 / 11)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_update_rule_is_that_of_the_configuration(name: str, kind: type[torch.optim.Optimizer]) -> None:
    optim = OptimConfig.model_validate({"name": name, "lr": 0.01, "weight_decay": 0.5, "momentum": 0.8})
    made = build_optimizer(make_network(FULL, FROZEN), optim)
    assert type(made) is kind
    [group] = made.param_groups
    assert (group["lr"], group["weight_decay"], group.get("momentum", 0.8)) == (0.01, 0.5, 0.8)


def test_biases_and_norms_have_no_decay_and_the_classifier_its_own_rate() -> None:
    network = make_network(FULL, FROZEN)
    optim = OptimConfig(lr=1.0, head_lr=3.0, weight_decay=0.5, decay="matrices", layer_decay=0.5)
    groups = parameter_groups(network, optim)
    assert len({(group["lr"], group["weight_decay"]) for group in groups}) == len(groups)
    found = {parameter: group for group in groups for parameter in group["params"]}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            group = found.pop(parameter)
            assert group["weight_decay"] == (0.0 if parameter.ndim < 2 else 0.5), name
            assert (group["lr"] == 3.0) == name.startswith("classifier."), name
    assert not found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optim.schedule=multistep"], "schedule=multistep and milestones"),
        (["optim.milestones=[3]"], "schedule=multistep and milestones"),
        (["optim.schedule=multistep", "optim.milestones=[5, 3]"], "must ascend"),
        (["optim.schedule=multistep", "optim.milestones=[3, 20]", "optim.epochs=20"], "milestone 20 is not before"),
        (["optim.warmup_epochs=20", "optim.epochs=20"], "warmup_epochs=20 must be less than epochs=20"),
        (["optim.patience=3", "optim.keep_epoch=last"], "patience needs keep_epoch=best_val"),
        (["optim.ema=0.9", "engine.zero_stage=3"], r"optim\.ema needs the whole weights"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", words)
