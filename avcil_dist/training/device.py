"""Device of a rank: a GPU of its own, or the processor where no GPU was given. Never the processor by accident.

The decision is a pure function of what torch sees and of the environment.
"""

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from avcil_dist import storage
from avcil_dist.errors import TrainingError, WorldError
from avcil_dist.world import World

DeviceSetting = Literal["auto", "cuda", "cpu"]

GIVEN_BY_SLURM = (
    "SLURM_GPUS_ON_NODE",
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "SLURM_GPUS",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS_PER_TASK",
)
VISIBLE = "CUDA_VISIBLE_DEVICES"
NO_GPUS = ("", "0", "none", "(null)")  # as the number of GPUs in a variable of SLURM
NO_DEVICES = ("", "-1", "NoDevFiles", "void")  # as CUDA_VISIBLE_DEVICES
NUM_RECORDED = 2000  # collectives in a trace
ON_THE_PROCESSOR = "or train on the processor with engine.device=cpu"


@dataclass(frozen=True)
class GpuFacts:
    """GPUs of this machine and process.

    `count`: those that torch can use. `files`: device files such as /dev/nvidia0. `built_for`: the version of CUDA of
    this torch, None for a build without it. `driver`: the newest version of CUDA that the driver supports, None where
    no driver can be loaded.
    """

    count: int
    files: tuple[str, ...] = ()
    built_for: str | None = None
    driver: str | None = None


def gpu_facts() -> GpuFacts:
    """Return the facts of this process. No GPU is initialised."""
    files = sorted(str(path) for path in Path("/dev").glob("nvidia[0-9]*"))
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return GpuFacts(count, tuple(files), torch.version.cuda or torch.version.hip, _driver_version())


def local_device(world: World, setting: DeviceSetting = "auto") -> torch.device:
    """Return the device of a rank: see `choose_device`."""
    return choose_device(setting, world, gpu_facts(), os.environ)


def choose_device(
    setting: DeviceSetting, world: World, facts: GpuFacts, environment: Mapping[str, str]
) -> torch.device:
    """Return a rank's own GPU among the visible ones, or the processor.

    A task that sees a single GPU has that one, whatever its local rank: schedulers can show each task its own. Raises
    WorldError for more ranks than GPUs, and where GPUs were requested or given and torch sees none.
    """
    if setting == "cpu":
        return torch.device("cpu")
    if facts.count == 0:
        given = given_gpus(facts, environment)
        if setting == "auto" and given is None:
            return torch.device("cpu")
        sign = "engine.device=cuda" if setting == "cuda" else given
        raise WorldError(f"{sign}, and torch sees no GPU: {why_none(facts, environment)}, {ON_THE_PROCESSOR}")
    if world.local_size <= facts.count:
        return torch.device("cuda", world.local_rank)
    if facts.count == 1 and world.launcher not in ("local", "none"):
        return torch.device("cuda", 0)
    raise WorldError(
        f"{world.local_size} processes on a machine with {facts.count} GPUs; start one for each, {ON_THE_PROCESSOR}"
    )


def given_gpus(facts: GpuFacts, environment: Mapping[str, str]) -> str | None:
    """Return the sign that this process was given GPUs, or runs on a machine that has them; None for neither."""
    for name in GIVEN_BY_SLURM:
        if environment.get(name, "") not in NO_GPUS:
            return f"SLURM gave GPUs to this job ({name}={environment[name]})"
    if environment.get(VISIBLE, "") not in NO_DEVICES:
        return f"{VISIBLE}={environment[VISIBLE]}"
    if facts.files:
        return f"this machine has {len(facts.files)} GPUs ({facts.files[0]})"
    return None


def why_none(facts: GpuFacts, environment: Mapping[str, str]) -> str:
    """Return why torch sees no GPU, and what to do about it."""
    visible = environment.get(VISIBLE)
    if visible is not None and visible in NO_DEVICES:
        return f"{VISIBLE}={visible} hides them all; unset it"
    if facts.built_for is None:
        return f"torch {torch.__version__} is built without CUDA; install its wheel for CUDA"
    if facts.driver is None:
        return (
            "no NVIDIA driver can be loaded (libcuda.so.1); install it, or start the container with it (docker run "
            "--gpus all, apptainer --nv)"
        )
    if _major(facts.driver) < _major(facts.built_for):
        return (
            f"the driver supports CUDA {facts.driver}, and this torch is built for CUDA {facts.built_for}; update the "
            f"driver, or install a torch for CUDA {_major(facts.driver)}"
        )
    if visible is not None:
        return f"{VISIBLE}={visible} selects none that this process may use; correct it"
    return "see whether nvidia-smi lists them on this machine; ask the scheduler for GPUs"


def device_name(device: torch.device) -> str:
    """Return a device's name for people: the GPU's model, or `cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def nccl_variables(trace: str | None) -> dict[str, str]:
    """Return variables with which NCCL records its collectives, and writes a trace when one exceeds its time limit.

    `trace`: the path of the traces without the rank, which NCCL appends; None, and a url, for NCCL's own place.
    """
    path = storage.local_path(trace) if trace else None
    files = {"TORCH_FR_DUMP_TEMP_FILE": path, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": path} if path else {}
    return {"TORCH_FR_BUFFER_SIZE": str(NUM_RECORDED), "TORCH_NCCL_DUMP_ON_TIMEOUT": "1", **files}


@contextmanager
def out_of_memory_as_line() -> Iterator[None]:
    """Raise a full GPU memory as a TrainingError that names the settings which need less of it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        more = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        raise TrainingError(
            f"the GPU's memory is full{f' ({more[1]} more were needed)' if more else ''}; set a smaller "
            "engine.micro_batch, shard with engine.zero_stage, or keep the clips elsewhere with data.clip_cache=host"
        ) from None


def _driver_version() -> str | None:
    version = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _major(version: str) -> int:
    return int(version.split(".")[0])
