"""Times of one training iteration of method `avcil`, with cached teacher logits: ours beside plain eager ones."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import EngineConfig, MethodConfig
from avcil_dist.data.batch import Batch
from avcil_dist.methods import make_method
from avcil_dist.methods.avcil import Avcil
from avcil_dist.methods.base import StepContext
from avcil_dist.models.attention import fused, module
from avcil_dist.models.attention.kernels_torch import TorchKernels
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.scenario import make_scenario
from avcil_dist.training.collectives import process_group
from avcil_dist.training.engine import Engine
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache
from avcil_dist.training.train_step import train_step
from avcil_dist.world import World
from launch.bench.contenders import BenchSetting
from launch.bench.eager_reference import EagerNetwork, avcil_loss
from tests.gpu.measured import peak_beyond, seconds, synchronize

CURRENT, REPLAY, CLASSES, OLD = 256, 128, 100, 90
LARGE, SMALL = (CURRENT, REPLAY, 8, 196, 768), (6, 3, 2, 64, 64)
TOP = 25  # kernels of the profile that are listed
Run = Callable[[], torch.Tensor]


def setting_of(device: torch.device, *, small: bool) -> BenchSetting:
    """BenchSetting of a step of VS100-CI; a small one where `small`."""
    current, replay, frames, positions, dim = SMALL if small else LARGE
    shape = {"current": current, "replay": replay, "frames": frames, "positions": positions, "dim": dim}
    threads = len(os.sched_getaffinity(0))
    return BenchSetting(
        **shape, classes=CLASSES, old=OLD, precision="bf16", attention="auto", device=device.type, threads=threads
    )


@contextmanager
def ours(setting: BenchSetting, batch: Batch) -> Iterator[Run]:
    """An iteration as the trainer runs it; its loss stays on the device."""
    device = torch.device(setting.device)
    scenario = make_scenario([str(label) for label in range(setting.classes)], classes_per_step=[OLD, CLASSES - OLD])
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(StepContext(scenario, 1))
    torch.manual_seed(0)
    student, older = (
        AudioVisualNetwork(Precomputed(setting.dim), Precomputed(setting.dim), count) for count in (CLASSES, OLD)
    )
    student.precision = older.precision = setting.precision
    student.attention.choice = older.attention.choice = setting.attention
    teacher = Teacher(older, device)
    valid = np.ones(len(batch.clips), dtype=np.bool_)
    teacher.use_cache(TeacherCache(batch.clips, valid, teacher.output(batch, method)))
    config = EngineConfig(precision=setting.precision)
    optimizer = build_optimizer(student, OptimConfig())
    engine = Engine(student, optimizer, config=config, rows=len(batch.labels), world=World(), device=device)
    engine.network.train()
    yield lambda: train_step(engine, batch, method=method, teacher=teacher, num_bad=0).parts["loss"]
    engine.close()


@contextmanager
def eager(setting: BenchSetting, batch: Batch, *, compiled: bool = False) -> Iterator[Run]:
    """Iteration in plain eager torch as in the paper, in float32 with TF32 allowed; the teacher runs on all clips."""
    torch.manual_seed(0)
    student, teacher = (EagerNetwork(setting.dim, count).to(setting.device) for count in (CLASSES, OLD))
    optimizer = torch.optim.Adam(student.parameters(), lr=OptimConfig().lr, fused=True)

    def loss_of() -> torch.Tensor:
        visual, audio = batch.visual.float(), batch.audio.float()
        with torch.no_grad():
            teacher_output = teacher(visual, audio)
        student_output = student(visual, audio)
        loss: torch.Tensor = avcil_loss(
            student_output, teacher_output, batch.labels, num_current=setting.current, tasks=[slice(0, OLD)]
        )
        return loss

    forward = torch.compile(loss_of) if compiled else loss_of

    def run() -> torch.Tensor:
        loss = forward()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    torch.backends.cuda.matmul.allow_tf32 = True
    yield run
    torch.backends.cuda.matmul.allow_tf32 = False


@contextmanager
def in_tiles(setting: BenchSetting, batch: Batch, *, compiled: bool = False) -> Iterator[Run]:
    """Ours tile by tile; `compiled`: the kernels of plain torch through torch.compile, in two large tiles."""
    with ExitStack() as stack:
        enter = stack.enter_context
        enter(mock.patch.object(module, "_is_fused", return_value=False))
        if compiled:
            enter(mock.patch.object(module, "_choose_kernels", return_value=TorchKernels()))
            enter(mock.patch.object(fused, "TILE_BYTES", dict.fromkeys(("cpu", "cuda"), 1 << 40)))
            for name in ("attend", "compare", "differentiate"):
                function = torch.compile(getattr(TorchKernels, name), dynamic=False)
                enter(mock.patch.object(TorchKernels, name, function))
        yield enter(ours(setting, batch))


@contextmanager
def without_graph(setting: BenchSetting, batch: Batch) -> Iterator[Run]:
    """Ours with the kernels of the loss launched one by one."""
    with mock.patch.object(Avcil, "has_static_loss", False), ours(setting, batch) as run:
        yield run


def contenders_of(device: torch.device) -> dict[str, Callable[[BenchSetting, Batch], Any]]:
    """The iterations that are compared on a device, by name."""
    found = {"ours": ours, "eager, TF32": eager}
    if device.type == "cuda":
        found |= {
            "ours, no loss graph": without_graph,
            "ours, in tiles": in_tiles,
            "plain torch kernels, torch.compile": lambda *given: in_tiles(*given, compiled=True),
        }
    return found


def measure(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Measure each contender's milliseconds, peak beyond the inputs and first loss; then a profile of ours."""
    setting = setting_of(device, small=small)
    inputs = setting.batch()
    found: dict[str, Any] = {"setting": [setting.current, setting.replay, setting.frames, setting.positions]}
    with process_group(World(), device, EngineConfig()):
        for name, contender in contenders_of(device).items():
            try:
                with contender(setting, inputs) as run:
                    found[name] = _measured(run, setting, inputs, device)
                    if name == "ours":
                        found["profile"] = profiled(run, device)
            except Exception as error:  # another contender may still run
                found[name] = {"failed": repr(error)[:500]}
            print(name, found[name], flush=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return found


def _measured(run: Run, setting: BenchSetting, inputs: Batch, device: torch.device) -> dict[str, float]:
    first = run().item()
    for _ in range(3):
        run()
    peak = peak_beyond(run, device)
    count = 1 if device.type == "cpu" else 20

    def many() -> None:
        for _ in range(count):
            run()

    each = seconds(many, device, warm_up=0) / count
    synchronize(device)
    started = time.perf_counter()
    run()
    run()
    host = (time.perf_counter() - started) / 2  # time to launch all kernels, without waiting for them
    return {
        "ms": 1e3 * each,
        "host ms": 1e3 * host,
        "TFLOP/s": 1e-12 * setting.flop(with_teacher=False) / each,
        "peak / inputs": peak / inputs.visual.nbytes,
        "first loss": first,
    }


def profiled(run: Run, device: torch.device, count: int = 5) -> dict[str, Any]:
    """Kernels by their time, milliseconds an iteration, and the share of the time in which the GPU runs none."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(count):
            run()
        synchronize(device)
    events = profile.key_averages()
    if device.type == "cpu":
        top = sorted(events, key=lambda event: -event.self_cpu_time_total)[:TOP]
        return {"top": [[event.key[:60], event.self_cpu_time_total / 1e3 / count, event.count] for event in top]}
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = sorted((event.time_range.start, event.time_range.end) for event in kernels)
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    top = sorted(events, key=lambda event: -event.self_device_time_total)[:TOP]
    return {
        "idle share": 1 - busy / (reached - spans[0][0]),
        "busy ms": busy / 1e3 / count,
        "kernels": len(spans) / count,
        "top": [[event.key[:90], event.self_device_time_total / 1e3 / count, event.count / count] for event in top],
    }
