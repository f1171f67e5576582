"""FLOP of a training iteration, against torch's own counter, and the peak that they are compared with."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import MLP

from avcil_dist.models.attention.module import AudioGuidedAttention
from avcil_dist.models.encoders.small import SmallVisual
from avcil_dist.models.flop import CountedFlop
from avcil_dist.training.iteration_metrics import measured_peak, peak_memory

pytestmark = pytest.mark.slow  # torch's counter takes seconds to import


@pytest.mark.parametrize("has_input_grad", [False, True])
def test_linear_layers_and_convolutions_count_as_torch_counts_them(has_input_grad: bool) -> None:
    pictures = torch.randn(2, 4, 3, 32, 32, requires_grad=has_input_grad)
    network = torch.nn.Sequential(SmallVisual(8), MLP(8, [16, 4]))
    with FlopCounterMode(display=False) as expected, CountedFlop(network) as count:
        network(pictures).sum().backward()
    assert count.total == expected.get_total_flops()


def test_self_attention_counts_as_torch_counts_it_and_a_frozen_network_its_forward_alone() -> None:
    from transformers import VideoMAEConfig, VideoMAEModel

    config = VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    config._attn_implementation = "eager"  # torch's counter does not know the fused kernel of the processor
    network = VideoMAEModel(config).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as expected, CountedFlop(network) as count:
        network(torch.randn(2, 4, 3, 32, 32))
    assert count.total == expected.get_total_flops()


def test_the_audio_guided_attention_counts_its_keys_forward_and_for_the_weights() -> None:
    attention = AudioGuidedAttention(16)
    with CountedFlop(attention) as count:
        pooled, _ = attention(torch.randn(3, 16), torch.randn(3, 2, 5, 16))
        pooled.sum().backward()
        with torch.no_grad():
            attention(torch.randn(3, 16), torch.randn(3, 2, 5, 16))  # a recomputation
    of_guide, of_keys = 2 * 3 * 16**2, 2 * 3 * 2 * 5 * 16**2
    assert count.total == 2 * (of_guide + of_keys)
    attention(torch.randn(3, 16), torch.randn(3, 2, 5, 16))
    assert count.total == 2 * (of_guide + of_keys)  # nothing is counted after the block


def test_the_peak_is_positive_and_no_more_than_a_machine_has() -> None:
    assert 1e8 < measured_peak(torch.device("cpu"), "float32") < 1e14
    assert 1e7 < peak_memory(torch.device("cpu")) < 1e12
