import pytest
import torch

from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.heads import LinearHead, grow_linear
from avcil_dist.models.network import AudioVisualNetwork


def test_growing_keeps_old_rows_and_biases_bit_for_bit() -> None:
    head = LinearHead(4, 3)
    grown = grow_linear(head, 5)
    assert grown.num_classes == 5
    assert torch.equal(grown.weight[:3], head.weight)
    assert torch.equal(grown.bias[:3], head.bias)


def test_a_grown_head_shares_nothing_with_the_old_one() -> None:
    head = LinearHead(4, 3)
    grown = grow_linear(head, 5)
    with torch.no_grad():
        grown.weight.zero_()
    assert head.weight.abs().sum() > 0
    assert grown.weight.requires_grad
    assert grown.weight.is_leaf


def test_new_rows_are_the_default_initialisation() -> None:
    grown = grow_linear(LinearHead(100, 1), 2001)
    new = grown.weight[1:]
    assert new.abs().max() <= 0.1  # uniform within 1/sqrt(dim)
    assert new.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.02)


def test_growing_follows_the_global_generator() -> None:
    head = LinearHead(4, 3)
    rows = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        rows.append(grow_linear(head, 5).weight[3:])
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0], rows[2])


def test_a_grown_head_has_the_dtype_of_the_old_one() -> None:
    assert grow_linear(LinearHead(4, 3, dtype=torch.float64), 5).weight.dtype == torch.float64


def test_a_head_grows_to_its_own_size_as_a_copy() -> None:
    head = LinearHead(4, 3)
    grown = grow_linear(head, 3)
    assert grown is not head
    assert torch.equal(grown.weight, head.weight)
    assert torch.equal(grown.bias, head.bias)


def test_a_head_does_not_shrink() -> None:
    with pytest.raises(ValueError, match="3 classes cannot grow to 2"):
        grow_linear(LinearHead(4, 3), 2)


def test_a_grown_network_gives_old_logits_unchanged() -> None:
    network = AudioVisualNetwork(Precomputed(4), Precomputed(4), num_classes=3)
    visual, audio = torch.randn(2, 2, 3, 4), torch.randn(2, 4)
    before = network(visual, audio).logits
    network.grow(5)
    assert network.num_classes == 5
    torch.testing.assert_close(network(visual, audio).logits[:, :3], before)
