"""Small step artifacts without training."""

import torch

from avcil_dist.config.schema import Config
from avcil_dist.data.exemplar_memory import ExemplarMemory
from avcil_dist.scenario import Scenario
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.streams.metrics import StreamMetrics


def make_artifact(step: int = 0, output: str = "runs") -> StepArtifact:
    """The artifact of a step of a stream of dog, cat and bus, with made-up numbers."""
    config = Config.model_validate(
        {
            "name": "tiny",
            "output": output,
            "data": {"manifest": "manifest.json"},
            "scenario": {"classes_per_step": [2, 1]},
            "method": {"name": "avcil"},
            "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
        }
    )
    metrics = StreamMetrics(
        step=step,
        accuracy=tuple((0.5,) * (row + 1) for row in range(step + 1)),
        seen_accuracy=(0.5,) * (step + 1),
        per_class={"dog": 0.25},
        num_test_clips=8,
        epoch=3,
        val_accuracy=0.75,
    )
    return StepArtifact(
        step=step,
        model={"weight": torch.arange(6.0).reshape(2, 3)},
        method={"means": torch.ones(2), "count": 3},
        memory=ExemplarMemory({"dog": ("a", "b"), "cat": ("c",)}),
        scenario=Scenario((("dog", "cat"), ("bus",))),
        metrics=metrics,
        config=config,
        manifest_hash="m",
    )
