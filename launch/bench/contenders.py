"""Contenders of `avcil bench step`: our iteration, a plain eager one, and the ceilings of the machine.

Each runs in its own process, so that its peak memory is measured separately. Our iteration is the one of a real step:
network, method `avcil`, its teacher, and the engine, on one rank.
"""

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from avcil_dist.config.optim import OptimConfig
from avcil_dist.config.schema import EngineConfig, MethodConfig, Precision
from avcil_dist.data.batch import Batch
from avcil_dist.methods import make_method
from avcil_dist.methods.base import StepContext
from avcil_dist.models.encoders.base import Precomputed
from avcil_dist.models.network import AudioVisualNetwork
from avcil_dist.models.precision import DTYPES
from avcil_dist.scenario import make_scenario
from avcil_dist.training import train_step as train_step_module
from avcil_dist.training.collectives import process_group
from avcil_dist.training.device import local_device
from avcil_dist.training.engine import Engine, initialised_deepspeed
from avcil_dist.training.optim import build_optimizer
from avcil_dist.training.teacher import Teacher
from avcil_dist.training.teacher_cache import TeacherCache
from avcil_dist.training.train_step import train_step
from avcil_dist.world import World
from launch.bench.eager_reference import EagerNetwork, avcil_loss

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
COPY_BYTES = 1 << 28
ContenderName = Literal["ours", "ours, teacher cached", "eager", "ceiling"]


@dataclass(frozen=True)
class BenchSetting:
    """Sizes of an iteration: `current` clips and `replay` exemplars of (frames, positions, dim) features in float16."""

    current: int
    replay: int
    frames: int
    positions: int
    dim: int
    classes: int
    old: int
    precision: Precision
    attention: Literal["auto", "torch"]
    device: str
    threads: int

    @property
    def product_flop(self) -> float:
        """FLOP of one matrix product of a clip's tokens with the keys' weights, or with their gradient."""
        return 2.0 * self.frames * self.positions * self.dim**2

    def flop(self, *, with_teacher: bool) -> float:
        """FLOP by definition: forward, the gradient of the weights, and the teacher's forward.

        The teacher processes all clips, or only exemplars if its logits are cached.
        """
        clips = self.current + self.replay
        return self.product_flop * (2 * clips + (clips if with_teacher else self.replay))

    def token_bytes(self, *, with_teacher: bool) -> float:
        """Bytes of tokens to read: once forward, once for the gradient of the weights, once by the teacher."""
        return self.flop(with_teacher=with_teacher) / self.dim

    def batch(self) -> Batch:
        """Draw random features, the same in every process."""
        random = torch.Generator().manual_seed(0)
        clips = self.current + self.replay
        visual = torch.empty(clips, self.frames, self.positions, self.dim, dtype=torch.float16)
        for clip in visual:  # one at a time, so that the peak is not before the measurement
            clip.copy_(torch.randn(clip.shape, generator=random))
        audio = torch.randn(clips, self.dim, generator=random).half()
        current = torch.randint(self.old, self.classes, (self.current,), generator=random)
        exemplars = torch.randint(0, self.old, (self.replay,), generator=random)
        labels = torch.cat([current, exemplars])
        numbers = torch.arange(clips).numpy()
        batch = Batch(visual, audio, labels, torch.ones(clips, dtype=torch.bool), self.current, clips=numbers)
        return batch.to(torch.device(self.device))


@dataclass(frozen=True)
class Measurement:
    """Measurement of one iteration: seconds, values by part, loss, and the peak memory of the process in bytes."""

    seconds: float
    parts: dict[str, float]
    loss: float
    peak: float


class Memory:
    """Peak memory above that at construction: GPU memory on a GPU, otherwise memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.start = 0.0
        self.reset()
        self.start = self.peak()

    def reset(self) -> None:
        """Reset the peak, if the operating system supports that."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif CLEAR.exists():
            CLEAR.write_text("5")

    def peak(self) -> float:
        """Return the peak in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() - self.start
        if STATUS.exists():
            line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return float(line.split()[1]) * 1024 - self.start
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - self.start


class Stopwatch:
    """Seconds of the named parts of an iteration; if `memory` is set, their peak memory in bytes instead."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self.memory: Memory | None = None

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a measurement around it."""

        def run(*arguments: Any, **named: Any) -> Any:
            if self.memory:
                self.memory.reset()
            synchronize(self.device)
            started = time.perf_counter()
            result = function(*arguments, **named)
            synchronize(self.device)
            value = self.memory.peak() if self.memory else time.perf_counter() - started
            self.parts[name] = self.parts.get(name, 0.0) + value
            return result

        return run


@contextmanager
def our_contender(
    setting: BenchSetting, batch: Batch, stopwatch: Stopwatch, *, cached: bool
) -> Iterator[Callable[[], float]]:
    """Iteration of the second step of a stream, as the trainer runs it."""
    device = torch.device(setting.device)
    names = [str(label) for label in range(setting.classes)]
    scenario = make_scenario(names, classes_per_step=[setting.old, setting.classes - setting.old])
    method = make_method(MethodConfig(name="avcil"))
    method.begin_step(StepContext(scenario, 1))
    torch.manual_seed(0)
    student, older = _network(setting, setting.classes), _network(setting, setting.old)
    teacher = Teacher(older, device)
    if cached:
        valid = np.ones(len(batch.clips), dtype=np.bool_)
        teacher.use_cache(TeacherCache(batch.clips, valid, teacher.output(batch, method)))
    optim, config = OptimConfig(), EngineConfig(precision=setting.precision)
    engine = Engine(
        student,
        build_optimizer(student, optim),
        config=config,
        rows=len(batch.labels),
        world=World(),
        device=device,
    )
    engine.network.train()
    engine.network.forward = stopwatch.timed("student forward", engine.network.forward)  # type: ignore[method-assign]
    engine.backward = stopwatch.timed("backward", engine.backward)  # type: ignore[method-assign]
    engine.step = stopwatch.timed("optimizer", engine.step)  # type: ignore[method-assign]
    # The process runs nothing else, so the module can be changed.
    train_step_module.method_loss = stopwatch.timed("losses", train_step_module.method_loss)  # type: ignore[attr-defined]
    teacher.logits = stopwatch.timed("teacher's logits", teacher.logits)  # type: ignore[method-assign]

    def run() -> float:
        return train_step(engine, batch, method=method, teacher=teacher).parts["loss"].item()

    yield run
    engine.close()


def _network(setting: BenchSetting, num_classes: int) -> AudioVisualNetwork:
    network = AudioVisualNetwork(Precomputed(setting.dim), Precomputed(setting.dim), num_classes)
    network.precision = setting.precision
    network.attention.choice = setting.attention
    return network


@contextmanager
def eager_contender(setting: BenchSetting, batch: Batch, stopwatch: Stopwatch) -> Iterator[Callable[[], float]]:
    """Same iteration in plain eager torch, as in the paper."""
    torch.manual_seed(0)
    student = EagerNetwork(setting.dim, setting.classes).to(setting.device)
    teacher = EagerNetwork(setting.dim, setting.old).to(setting.device)
    optim = OptimConfig()
    optimizer = torch.optim.Adam(student.parameters(), lr=optim.lr, weight_decay=optim.weight_decay)
    student_forward, teacher_forward = (
        stopwatch.timed("student forward", student),
        stopwatch.timed("teacher forward", teacher),
    )
    step, loss_of = stopwatch.timed("optimizer", optimizer.step), stopwatch.timed("losses", avcil_loss)

    def run() -> float:
        visual, audio = batch.visual.float(), batch.audio.float()
        student_output = student_forward(visual, audio)
        with torch.no_grad():
            teacher_output = teacher_forward(visual, audio)
        loss = loss_of(
            student_output, teacher_output, batch.labels, num_current=setting.current, tasks=[slice(0, setting.old)]
        )
        optimizer.zero_grad()
        stopwatch.timed("backward", loss.backward)()
        step()
        return loss.item()

    yield run


@contextmanager
def ceilings(setting: BenchSetting, stopwatch: Stopwatch) -> Iterator[Callable[[], float]]:
    """Ceilings of the machine: the matrix product of a clip, and a copy."""
    device = torch.device(setting.device)
    left = torch.randn(setting.frames * setting.positions, setting.dim, device=device)
    right = torch.randn(setting.dim, setting.dim, device=device)
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    precisions: set[Precision] = {"float32", setting.precision}
    pairs = {name: (left.to(DTYPES[name]), right.to(DTYPES[name])) for name in sorted(precisions)}

    def run() -> float:
        for name, pair in pairs.items():
            torch.mm(*pair)
            stopwatch.timed(f"matmul {name}", torch.mm)(*pair)
        stopwatch.timed("copy", target.copy_)(source)
        return 0.0

    yield run


def synchronize(device: torch.device) -> None:
    """Wait for the work queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _contender(
    name: ContenderName, setting: BenchSetting, batch: Batch, stopwatch: Stopwatch
) -> Iterator[Callable[[], float]]:
    if name == "ceiling":
        contender = ceilings(setting, stopwatch)
    elif name == "eager":
        contender = eager_contender(setting, batch, stopwatch)
    else:
        contender = our_contender(setting, batch, stopwatch, cached=name == "ours, teacher cached")
    with contender as run:
        yield run


def serve(name: ContenderName, setting: BenchSetting, connection: Connection) -> None:
    """Run a contender in this process: one iteration and one `Measurement` for each request.

    The request "time" measures the seconds of the parts, "memory" their peaks in bytes; None ends the process.
    """
    torch.set_num_threads(setting.threads)
    world = World()
    device = local_device(world, "cuda" if setting.device == "cuda" else "cpu")  # NCCL needs the number of the GPU
    with process_group(world, device, EngineConfig()):
        if name in ("ours", "ours, teacher cached"):
            initialised_deepspeed(world, device)
        _load_libraries(setting)
        batch, stopwatch = setting.batch(), Stopwatch(device)
        memory = Memory(device)
        with _contender(name, setting, batch, stopwatch) as run:
            while request := connection.recv():
                stopwatch.parts, stopwatch.memory = {}, memory if request == "memory" else None
                started = time.perf_counter()
                loss = run()
                synchronize(device)
                connection.send(Measurement(time.perf_counter() - started, stopwatch.parts, loss, memory.peak()))


def _load_libraries(setting: BenchSetting) -> None:
    """Load the libraries of a first matrix product, whose memory does not belong to an iteration."""
    for dtype in {torch.float32, DTYPES[setting.precision]}:
        square = torch.ones(64, 64, dtype=dtype, device=setting.device)
        torch.nn.functional.linear(square, square.requires_grad_()).float().exp().sum().backward()
