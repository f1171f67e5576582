"""Tests of the package: the plug-ins are found, and the loss is the library's."""

import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import Targets
from avcil_dist.models.encoders.build import visual_class
from avcil_dist.models.outputs import Output


def test_the_loss_is_a_mean_over_all_rows():
    method = make_method(MethodConfig(name="own_replay", smoothing=0.0))
    logits, labels = torch.randn(6, 4), torch.arange(6) % 4
    whole = method.loss(Targets(labels, 4), Output(logits), None)["loss"]
    halves = [
        method.loss(Targets(labels[part], 2), Output(logits[part]), None)["loss"] for part in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(whole, torch.stack(halves).mean())


def test_the_encoder_gives_one_token_per_frame():
    kind = visual_class("mean_colour")
    assert kind(kind.Options(dim=8))(torch.zeros(2, 3, 3, 16, 16)).shape == (2, 3, 1, 8)
