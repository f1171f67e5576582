"""Nothing of a step is on the wrong device: streams of all methods on a pretended GPU, which refuses other tensors."""

from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import SmallConfig
from avcil_dist.config.schema import ClipConfig, MethodConfig
from avcil_dist.data import loader
from avcil_dist.data.manifest import load_manifest
from avcil_dist.inference.predict import Predictor
from avcil_dist.methods import make_method, method_names
from avcil_dist.methods.base import ClosedFormMethod, StepContext
from avcil_dist.models.attention import module
from avcil_dist.models.attention.kernels_torch import TorchKernels
from avcil_dist.models.encoders.build import build_audio_encoder, build_visual_encoder
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.streams.artifact import StepArtifact
from avcil_dist.system.signals import StopRequest
from avcil_dist.training import engine, iteration_metrics, loss_graph
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from tests.helpers.foreign_device import DEVICE, pretended
from tests.helpers.streams import STEPS, write_config

# What makes a stream short. The expansions of features are long by default.
SHORT = ("optim.epochs=1", "tracking.every=1", "snapshot.every_iterations=2")
LONG_FEATURES = ("acil", "air", "ranpac")


class PlainEngine:
    """DeepSpeed's engine without DeepSpeed, which knows no pretended devices."""

    def __init__(self, *, model: nn.Module, optimizer: torch.optim.Optimizer, **_: Any) -> None:
        self.module, self.optimizer = model, optimizer
        self.zero_grad = optimizer.zero_grad

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)

    def set_gradient_accumulation_boundary(self, is_last: bool) -> None:
        pass

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def destroy(self) -> None:
        pass


@pytest.fixture
def without_cuda(one_rank: None) -> Iterator[None]:
    """Replaces what only a real GPU has: streams, graphs, kernels, page-locked memory, sizes."""
    load = loader._load

    def load_pageable(sampler: Any, manifest: Any, labels: Any, data: Any, pin: bool, *rest: Any) -> Any:
        return load(sampler, manifest, labels, data, False, *rest)

    def to_device(batches: Any, device: torch.device) -> Any:
        return (batch.to(device) for batch in batches)

    def capture(compute: Any) -> Any:
        compute()
        return compute

    event = SimpleNamespace(synchronize=lambda: None)
    deepspeed = SimpleNamespace(initialize=lambda **arguments: (PlainEngine(**arguments),))
    with ExitStack() as stack:
        for owner, name, made in (
            (torch.cuda, "mem_get_info", lambda device: (10**9, 10**9)),
            (torch.cuda, "max_memory_allocated", lambda device: 1),
            (torch.cuda, "synchronize", lambda device: None),
            (torch.cuda, "get_device_name", lambda device: "pretended"),
            (torch.cuda, "get_rng_state", lambda device: torch.get_rng_state()),
            (torch.cuda, "set_rng_state", lambda state, device: None),
            (torch.random, "fork_rng", lambda devices: nullcontext()),
            (torch.cuda, "current_stream", lambda: SimpleNamespace(record_event=lambda: event)),
            (iteration_metrics, "PRODUCT_SIZES", {"cuda": 8}),
            (loader, "_load", load_pageable),
            (loader, "_prefetched", to_device),
            (module, "_is_fused", lambda *arguments: False),
            (module, "_choose_kernels", lambda *arguments: TorchKernels()),
            (loss_graph, "capture", capture),
            (engine, "initialised_deepspeed", lambda *arguments: deepspeed),
            (engine, "release", lambda made: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, made))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("streams")


def train(folder: Path, name: str, *settings: str) -> StepArtifact:
    """Train the first two steps of a stream; returns the artifact of the second one."""
    output = f"output={folder}/{name}{len(settings)}"
    config = load_config(str(write_config(folder)), (*SHORT, f"method={name}", output, *settings))
    for step in range(len(STEPS) - 1):
        artifact = step_in_group(config, step, world=World(), observers=(), device=DEVICE, stop=StopRequest())
    return artifact


@pytest.mark.parametrize("name", method_names())
def test_a_stream_of_every_method_runs_on_one_device(folder: Path, without_cuda: None, name: str) -> None:
    with pretended():
        artifact = train(folder, name, *(("method.expansion=64",) if name in LONG_FEATURES else ()))
        shape = load_manifest(artifact.config.data.manifest).shape
        sizes = [shape[side] for side in ("frames", "positions", "dim")]
        for modality in (None, "audio"):
            predictor = Predictor(artifact, shape, name, modality, DEVICE)
            assert predictor.score(torch.randn(2, *sizes), torch.randn(2, sizes[2])).device == DEVICE
    assert len(artifact.metrics.seen_accuracy) == len(STEPS) - 1
    assert artifact.metrics.seen_accuracy[-1] > 0.2


@pytest.mark.parametrize("cache", ["device", "host"])
def test_micro_batches_averages_and_fusions_run_on_one_device(folder: Path, without_cuda: None, cache: str) -> None:
    settings = ("engine.micro_batch=6", "optim.ema=0.9", "model.fusion=transformer", f"data.clip_cache={cache}")
    with pretended():
        assert len(train(folder / cache, "avcil", *settings).metrics.seen_accuracy) == len(STEPS) - 1


@pytest.mark.parametrize("build", [build_visual_encoder, build_audio_encoder])
def test_small_encoders_run_on_one_device(build: Any) -> None:
    clip = ClipConfig(frames=2, size=32, mel_frames=32, mel_bins=32)
    inputs = (1, 2, 3, 32, 32) if build is build_visual_encoder else (1, 32, 32)
    with pretended():
        encoder = build(SmallConfig(kind="small", dim=8), clip, None).to(DEVICE)
        encoded = encoder(torch.randn(*inputs, device=DEVICE))
        encoded.sum().backward()
        assert encoded.device == DEVICE


def test_the_pretended_device_refuses_what_a_real_one_refuses() -> None:
    with pretended():
        there, here = torch.ones(2, 3, device=DEVICE), torch.ones(3)
        assert (there.device, (there + 1).device, there.cpu().device) == (DEVICE, DEVICE, torch.device("cpu"))
        assert (there * torch.tensor(2.0))[torch.tensor([0])].tolist() == [[2, 2, 2]]
        for mixed in (
            lambda: there + here,
            lambda: here + there,
            lambda: there @ here,
            lambda: torch.stack([here, there[0]]),
        ):
            with pytest.raises(RuntimeError, match="on cuda:0 and on the cpu"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.zeros(3).copy_(there[0]).device.type == "cpu"


@pytest.mark.parametrize(
    ("name", "options"), [("analytic", {}), ("analytic", {"gamma": "evidence"}), ("kernel", {}), ("slda", {})]
)
def test_a_head_of_one_modality_is_solved_where_its_sums_are(name: str, options: dict[str, str]) -> None:
    method = make_method(MethodConfig.model_validate({"name": name} | options))
    assert isinstance(method, ClosedFormMethod)
    assert method.takes_one_modality
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    with pretended():
        audio, visual = torch.randn(40, 5, device=DEVICE), torch.randn(40, 2, 5, device=DEVICE)
        both = Output(torch.zeros(40, 0, device=DEVICE), audio, visual)
        method.begin_sums({0: 20, 1: 20})
        method.accumulate(both, torch.arange(40, device=DEVICE) % 2)
        method.statistics()
        method.choose(method.solve(), [])
        for output in (both, both._replace(visual=None), both._replace(audio=None)):
            assert method.scores(output).device == DEVICE
