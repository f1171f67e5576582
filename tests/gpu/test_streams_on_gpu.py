"""Whole steps on a GPU: losses close to those on a CPU, and kills that change no bit.

With GPU_TESTS_ON_CPU=1 they run on a machine without a GPU too, which shows faults of the tests. The order is that in
which they tell most: first those that need least.
"""

import faulthandler
import json
import os
import random
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config, MethodConfig
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext, Targets
from avcil_dist.scenario import make_scenario
from avcil_dist.system.signals import StopRequest
from avcil_dist.training.device import device_name
from avcil_dist.training.loss_graph import method_loss
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import run_step
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.end_to_end.test_kills import run_and_kill
from tests.helpers.streams import avcil, last_artifact, train, weights_digest, write_config
from tests.unit.test_loss_graph import CLASSES, drawn, gradients

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not os.environ.get("GPU_TESTS_ON_CPU"), reason="needs a GPU, or GPU_TESTS_ON_CPU"
)

HANGS_AFTER = 100  # seconds of a step
TOKENS = {"frames": 2, "positions": 64, "dim": 64}  # a shape that the fused attention supports
STEPS = {"scenario": {"classes_per_step": 3}, "snapshot": {"every_iterations": 5}}
OPTIM = {"epochs": 8, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 18, "lr": 0.001}


class Losses(Observer):
    """The mean loss of each epoch."""

    def __init__(self) -> None:
        self.means: list[float] = []

    def epoch(self, epoch: int, values: Mapping[str, float]) -> None:
        self.means.append(values["loss/total"])


def _run_step(config: Config, step: int) -> list[float]:
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True)
    seen = Losses()
    run_step(config, step, world=World(), observers=[seen], stop=StopRequest())
    return seen.means


def losses(config: Config, device: str) -> list[float]:
    """The losses of two steps, each in a process of its own."""
    found: list[float] = []
    for step in (0, 1):
        engine = config.engine.model_copy(update={"device": device})
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found += fresh.submit(_run_step, config.model_copy(update={"engine": engine}), step).result()
    return found


def config_of(folder: Path) -> Path:
    make_feature_shards(folder / "shards", classes=6, clips={"train": 24, "val": 6, "test": 6}, **TOKENS)
    return write_config(folder, **STEPS, optim=OPTIM)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all tests of a run, also of those in other processes."""
    return Path(os.environ.get("GPU_TESTS_SHARED") or tmp_path_factory.mktemp("shared"))


def losses_on_a_cpu(shared: Path, precision: str) -> list[float]:
    """The losses on the processor without ZeRO, computed once for all tests.

    For bf16 they are those of float32. In fp16 the first updates are left out until the loss scale fits.
    """
    precision = "fp16" if precision == "fp16" else "float32"
    folder = shared / precision
    path = folder / "losses.json"
    with FileLock(shared / f"{precision}.lock"):
        if not path.exists():
            folder.mkdir(exist_ok=True)
            settings = (f"engine.precision={precision}", f"output={folder}/runs")
            path.write_text(json.dumps(losses(load_config(str(config_of(folder)), settings), "cpu")))
    found: list[float] = json.loads(path.read_text())
    return found


@needs_gpu
def test_a_loss_graph_gives_the_bits_of_the_loss() -> None:
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(
        StepContext(make_scenario([str(label) for label in range(CLASSES)], classes_per_step=[2, 2, 2]), 2)
    )
    for seed in (0, 1, 2):
        targets, output, teacher = drawn(seed)
        targets = Targets(targets.labels.cuda(), targets.num_current)
        output = output.map(lambda tensor: tensor.detach().cuda().requires_grad_())
        teacher = teacher.map(torch.Tensor.cuda)
        expected = method.loss(targets, output, teacher)
        found = method_loss(method, targets, output, teacher)
        assert type(found["loss"].grad_fn).__name__ == "_LossBackward"
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert all(map(torch.equal, gradients(found["loss"], output), gradients(expected["loss"], output)))


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "float32"), (0, "bf16"), (0, "fp16"), (2, "float32"), (1, "bf16"), (2, "fp16"), (3, "bf16"), (3, "fp16")],
)
def test_losses_are_close_to_those_on_a_cpu(tmp_path: Path, shared: Path, stage: int, precision: str) -> None:
    tolerance = 1e-3 if precision == "float32" else 0.02
    common = (f"engine.zero_stage={stage}", f"engine.precision={precision}")
    there = losses(load_config(str(config_of(tmp_path)), (*common, f"output={tmp_path}/there")), DEVICE)
    print("losses on the device:", there)
    here = losses_on_a_cpu(shared, precision)
    print("losses on a CPU:", here)
    assert len(there) == 2 * OPTIM["epochs"]
    assert there == pytest.approx(here, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("engine", ["zero0", "zero0_bf16", "zero2_bf16", "zero3"])
def test_a_stream_reaches_the_accuracy_of_a_cpu(tmp_path: Path, engine: str) -> None:
    config = write_config(tmp_path)
    there = last_artifact(train(config, f"engine={engine}", f"output={tmp_path}/there"))
    here = last_artifact(train(config, "engine.device=cpu", f"output={tmp_path}/here"))
    assert (there.device, here.device) == (device_name(torch.device(DEVICE)), "cpu")
    assert there.metrics.seen_accuracy == pytest.approx(here.metrics.seen_accuracy, abs=0.1)
    assert {weights.dtype for weights in there.model.values()} == {weights.dtype for weights in here.model.values()}
    assert "all steps are committed" in avcil("train", config, f"output={tmp_path}/there", f"engine={engine}").output


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_stream_killed_on_a_gpu_ends_with_the_bits_of_an_unkilled_one(tmp_path: Path, precision: str) -> None:
    config, settings = config_of(tmp_path), (f"engine.precision={precision}", "optim.epochs=60")
    whole = train(config, *settings, f"output={tmp_path}/whole")
    stream = tmp_path / "killed" / Path(whole).name
    command = [sys.executable, "-m", "avcil_dist", "train", str(config), *settings, f"output={tmp_path}/killed"]
    codes = [run_and_kill(command, stream, kind, random.Random(1)) for kind in ("rank", "stop")]
    train(config, *settings, f"output={tmp_path}/killed")
    assert [weights_digest(str(stream), step) for step in (0, 1)] == [weights_digest(whole, step) for step in (0, 1)]
    assert all(codes), "no kill came in time"
