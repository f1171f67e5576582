"""Low-rank adapters of both transformers: what they train, and their merged weights."""

import pytest
import torch
from torch import Tensor, nn

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.adapters import merge_adapters
from avcil_dist.models.network import Network, build_network
from avcil_dist.models.state_dict import load_whole_state

CLIP = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
RANK, DEPTH = 3, 2
TINY = {"weights": "random", "dim": 24, "depth": DEPTH, "heads": 2}
ADAPTERS = {"train": "adapters", "adapter_rank": RANK}
LAYERS = {"visual": 6, "audio": 4}  # linear layers of a block: timm's has queries, keys and values in one


def network(options: dict[str, object], keys: list[str] | None = None) -> Network:
    config = {"visual": {"kind": "videomae", **TINY, **options}, "audio": {"kind": "audiomae", **TINY, **options}}
    torch.manual_seed(0)
    return build_network(ModelConfig.model_validate(config), CLIP, {}, num_classes=3, state_keys=keys)


def clips() -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(1)
    return torch.randn(4, 4, 3, 32, 32, generator=random), torch.randn(4, 64, 32, generator=random)


def encoder_state(made: Network) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in made.state_dict().items() if "_encoder." in name}


def trained() -> Network:
    """A network whose encoders have adapters of two optimizer steps."""
    made = network(ADAPTERS).train()
    optimizer = torch.optim.Adam([value for value in made.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(2):
        made(*clips()).logits.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


def test_adapted_encoders_begin_as_the_pretrained_ones() -> None:
    adapted, frozen = network(ADAPTERS), network({"train": "frozen"})
    encoders = ((made.visual_encoder, made.audio_encoder) for made in (adapted, frozen))
    for ours, theirs, inputs in zip(*encoders, clips(), strict=True):
        assert isinstance(ours, nn.Module)
        assert isinstance(theirs, nn.Module)
        theirs.load_state_dict(merge_adapters(ours.state_dict()))
        assert torch.equal(ours(inputs), theirs(inputs))


def test_adapters_alone_move_and_those_of_every_linear_layer_do() -> None:
    before, after = encoder_state(network(ADAPTERS)), encoder_state(trained())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    adapters = {name for name in after if "lora_" in name}
    assert moved == adapters
    assert len(adapters) == 2 * DEPTH * sum(LAYERS.values())


def test_merged_weights_are_those_of_a_frozen_encoder_with_the_same_outputs() -> None:
    adapted = trained().double().eval()
    state = merge_adapters(adapted.state_dict())
    plain = network({"train": "frozen"})
    assert state.keys() == plain.state_dict().keys()
    merged = network(ADAPTERS, list(state)).double()
    load_whole_state(merged, state, "here")
    assert not [name for name, value in merged.named_parameters() if "_encoder." in name and value.requires_grad]
    with torch.no_grad():
        visual, audio = (inputs.double() for inputs in clips())
        torch.testing.assert_close(merged(visual, audio).logits, adapted(visual, audio).logits, rtol=1e-10, atol=1e-12)
        encoded = merged.encode_frozen(visual, audio)
        assert encoded[0].shape == (4, 2, 4, 24)  # so student and teacher share them
        assert torch.equal(merged(*encoded).logits, merged(visual, audio).logits)
    before = merge_adapters(network(ADAPTERS).state_dict())
    for name, value in state.items():
        if "_encoder." in name and value.ndim == 2 and not torch.equal(value.float(), before[name]):
            assert torch.linalg.matrix_rank(value - before[name].double(), rtol=1e-6) == RANK, name


def test_a_state_with_adapters_is_of_a_network_that_still_has_them() -> None:
    state = trained().state_dict()
    again = network(ADAPTERS, list(state))
    load_whole_state(again, state, "here")
    assert torch.equal(again(*clips()).logits, trained()(*clips()).logits)


@pytest.mark.parametrize("value", [{}, {"a.weight": torch.ones(2)}])
def test_a_state_without_adapters_stays(value: dict[str, Tensor]) -> None:
    assert merge_adapters(value) == value
