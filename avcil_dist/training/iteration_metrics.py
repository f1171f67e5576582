"""Metrics of single iterations for the observers: loss and its parts, gradient, speed, memory, waiting for data.

They are read where the trainer has just waited for the device, every `tracking.every` iterations and at the end of an
epoch. Only values are read: weights and losses have the same bits with and without them.
"""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
from torch import Tensor, nn

from avcil_dist.config.schema import Precision
from avcil_dist.models.flop import CountedFlop, FlopCount
from avcil_dist.models.precision import DTYPES
from avcil_dist.training.collectives import Votes
from avcil_dist.training.incremental_step import Step
from avcil_dist.training.observer import Observer

PRODUCT_SIZES = {"cuda": 4096, "cpu": 512}  # of the matrices whose product is timed
TURNS = 3


class IterationMetrics:
    """Metrics of the iterations since the last report. All ranks call it together.

    Rates are of the global batch. Peak memory and waiting time are those of the rank with the most.
    """

    def __init__(self, step: Step, observer: Observer, votes: Votes, per_epoch: int) -> None:
        self.step, self.observer, self.votes, self.per_epoch = step, observer, votes, per_epoch
        self._flop: FlopCount | None = None  # of one iteration of this rank
        self._seconds, self._wait_seconds, self._count = 0.0, 0.0, 0

    def is_due(self, iteration: int) -> bool:
        """Whether a report is due after `iteration` iterations."""
        return iteration % self.step.config.tracking.every == 0 or iteration % self.per_epoch == 0

    def counting(self, network: nn.Module) -> AbstractContextManager[object]:
        """Context of an iteration; the first one counts its FLOP."""
        if self._flop is not None:
            return nullcontext()
        counter = CountedFlop(network)
        self._flop = counter.count
        return counter

    def add(self, seconds: float, counts: Mapping[str, float]) -> None:
        """Add an iteration, its time and the counts of its batch."""
        self._seconds += seconds
        self._wait_seconds += counts.get("stall_seconds", 0.0)
        self._count += 1

    def report(
        self, iteration: int, losses: Mapping[str, Tensor], gradient_norm: float | Tensor | None, rate: float
    ) -> None:
        """Report the last iteration, and the rates since the last report. `rate` is the learning rate."""
        wait, peak_bytes = self.votes.maxima([self._wait_seconds, peak_memory(self.step.device)])
        values = {
            f"loss/{'total' if name == 'loss' else name}": float(value.detach()) for name, value in losses.items()
        }
        if gradient_norm is not None:
            values["optim/gradient_norm"] = float(gradient_norm)
        values |= {
            "optim/learning_rate": rate,
            "speed/clips_per_second": self._count * self.step.config.optim.global_batch / self._seconds,
            "speed/data_wait_share": wait / self._seconds,
            "memory/peak_gb": peak_bytes / 1e9,
        }
        if self._flop is not None and self._flop.total:
            own = self._count * self._flop.total / self._seconds
            values["speed/tflop_per_second"] = own * self.step.world.size / 1e12
            values["speed/share_of_peak"] = own / self._peak_flop
        self._seconds, self._wait_seconds, self._count = 0.0, 0.0, 0
        self.observer.iteration(iteration, values)

    @cached_property
    def _peak_flop(self) -> float:
        return measured_peak(self.step.device, self.step.config.engine.precision)


def peak_memory(device: torch.device) -> float:
    """Return the largest memory of this process so far, in bytes: of the GPU, or of the process on the processor."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def measured_peak(device: torch.device, precision: Precision) -> float:
    """Return the FLOP per second of a large matrix product, the best of three. It takes milliseconds."""
    size = PRODUCT_SIZES[device.type]
    matrix = torch.ones(size, size, dtype=DTYPES[precision], device=device)
    seconds = []
    for _ in range(1 + TURNS):
        _wait(device)
        started = time.perf_counter()
        matrix @ matrix
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return 2.0 * size**3 / min(seconds[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
