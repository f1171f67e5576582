"""An inference pass leaves the network in the mode that it found, however the pass ends."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.data.batch import Batch
from avcil_dist.errors import DataError
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.training.inference_pass import InferencePass

NOTHING: Any = None


@pytest.fixture
def inference(monkeypatch: pytest.MonkeyPatch) -> InferencePass:
    """A pass with two batches, after which it finds that too many clips are damaged."""

    def batches(*_: object) -> Iterator[Batch]:
        for _ in range(2):
            yield Batch(torch.randn(3, 2, 3, 4), torch.randn(3, 4), torch.zeros(3), torch.ones(3, dtype=torch.bool), 3)
        raise DataError("damaged")

    monkeypatch.setattr(InferencePass, "batches", batches)
    return InferencePass(NOTHING, NOTHING, NOTHING, NOTHING, NOTHING)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_read", [1, 2, 3])
def test_the_mode_is_restored_after_a_pass_that_stops_early_or_fails(
    inference: InferencePass, training: bool, num_read: int
) -> None:
    network = AudioVisualNetwork(Precomputed(4), Precomputed(4), num_classes=2).train(training)
    outputs = inference.run(network, np.arange(6))
    for _ in range(min(num_read, 2)):
        _, output = next(outputs)
        assert not network.training
        assert not output.logits.requires_grad
    if num_read == 3:
        with pytest.raises(DataError, match="damaged"):
            next(outputs)
    outputs.close()
    assert network.training is training
