"""Maps of a clip: of the class that the network predicts, whatever is added to the scores of its head."""

from typing import Any

import pytest
import torch
from torch import nn

from avcil_dist.config.encoders import ModelConfig
from avcil_dist.config.schema import ClipConfig, MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.models.extension import Extension
from avcil_dist.models.network import AudioVisualNetwork, build_network
from avcil_dist.models.network_spec import NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.training.clip_maps import clip_maps

CLIPS, FRAMES, POSITIONS, DIM, CLASSES = 12, 3, 4, 6, 5
FEATURES = {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}}


class Biases(Extension):
    """Biases of the logits, and louder sound."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-0.2, 0.2, num_classes))

    def adapt(self, sound: Any, tokens: Any) -> tuple[Any, Any]:
        return 2 * sound, tokens

    def refine(self, output: Output) -> Output:
        return output._replace(logits=output.logits + self.bias)


@pytest.mark.parametrize("fusion", ["attention", "concat"])
@pytest.mark.parametrize(
    "spec", [NetworkSpec(), NetworkSpec(anchor=2), NetworkSpec(extension=Biases), NetworkSpec(branches=True)]
)
def test_the_predicted_class_of_the_maps_is_that_of_the_network(spec: NetworkSpec, fusion: str) -> None:
    torch.manual_seed(0)
    model = ModelConfig.model_validate(FEATURES | {"fusion": fusion})
    shape = {"frames": FRAMES, "positions": POSITIONS, "dim": DIM}
    network = build_network(model, ClipConfig(), shape, CLASSES, network_spec=spec).eval()
    assert isinstance(network, AudioVisualNetwork)
    if network.anchor is not None:
        network.anchor.set_weights(torch.randn_like(network.anchor.weights))
    method = make_method(MethodConfig(name="finetune"))
    visual, audio = torch.randn(CLIPS, FRAMES, POSITIONS, DIM), torch.randn(CLIPS, DIM)
    with torch.no_grad():
        expected = method.scores(network(visual, audio)).argmax(dim=1).tolist()
    maps = [clip_maps(network, method, visual[row], audio[row]) for row in range(CLIPS)]
    assert [found.predicted for found in maps] == expected
    assert len(set(expected)) > 1  # no class is predicted always
