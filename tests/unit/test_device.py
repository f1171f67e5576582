"""The decision for a device, on tables of machines and environments. No GPU is needed."""

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.errors import TrainingError, WorldError
from avcil_dist.streams.snapshots import snapshots_url
from avcil_dist.training.device import (
    GpuFacts,
    choose_device,
    device_name,
    gpu_facts,
    nccl_variables,
    out_of_memory_as_line,
)
from avcil_dist.training.step import trace_prefix
from avcil_dist.world import World

NONE = GpuFacts(0, (), "13.0", None)
EIGHT = GpuFacts(8, tuple(f"/dev/nvidia{number}" for number in range(8)), "13.0", "13.0")
FILES = ("/dev/nvidia0", "/dev/nvidia1")
OLD_DRIVER = GpuFacts(0, FILES, "13.0", "12.4")
NO_DRIVER = GpuFacts(0, FILES, "13.0", None)
WITHOUT_CUDA = GpuFacts(0, FILES, None, "13.0")
FINE = GpuFacts(0, FILES, "13.0", "13.1")


def rank(local_rank: int, local_size: int, launcher: str = "local") -> World:
    return World(local_rank, local_size, local_rank, local_size, launcher=launcher)


def test_each_rank_has_a_gpu_of_its_own() -> None:
    devices = [choose_device("auto", rank(number, 8), EIGHT, {}) for number in range(8)]
    assert devices == [torch.device("cuda", number) for number in range(8)]


@pytest.mark.parametrize("launcher", ["slurm", "torchrun", "mpirun"])
def test_a_task_that_sees_one_gpu_has_it_whatever_its_local_rank(launcher: str) -> None:
    one = GpuFacts(1, FILES, "13.0", "13.0")
    assert choose_device("auto", rank(3, 4, launcher), one, {"CUDA_VISIBLE_DEVICES": "3"}) == torch.device("cuda", 0)


@pytest.mark.parametrize(("count", "launcher"), [(1, "local"), (2, "slurm"), (2, "torchrun")])
def test_more_ranks_than_gpus_are_an_error(count: int, launcher: str) -> None:
    with pytest.raises(
        WorldError, match=f"4 processes on a machine with {count} GPUs; start one for each, or train on"
    ):
        choose_device("auto", rank(0, 4, launcher), GpuFacts(count, FILES, "13.0", "13.0"), {})


def test_the_processor_is_used_where_there_is_no_sign_of_a_gpu_or_where_it_is_asked_for() -> None:
    cpu = torch.device("cpu")
    assert choose_device("auto", rank(0, 2), NONE, {}) == cpu
    without = {"SLURM_GPUS_ON_NODE": "0", "SLURM_JOB_GPUS": "", "CUDA_VISIBLE_DEVICES": ""}
    assert choose_device("auto", rank(0, 2), NONE, without) == cpu
    assert choose_device("cpu", rank(9, 10), EIGHT, {"SLURM_GPUS": "8"}) == cpu
    assert choose_device("cpu", World(), OLD_DRIVER, {}) == cpu


@pytest.mark.parametrize(
    ("facts", "environment", "sign", "reason"),
    [
        (
            OLD_DRIVER,
            {},
            "this machine has 2 GPUs (/dev/nvidia0), ",
            "the driver supports CUDA 12.4, and this torch is",
        ),
        (NO_DRIVER, {}, "this machine has 2 GPUs", "no NVIDIA driver can be loaded"),
        (WITHOUT_CUDA, {}, "this machine has 2 GPUs", "is built without CUDA; install"),
        (
            FINE,
            {"CUDA_VISIBLE_DEVICES": ""},
            "this machine has 2 GPUs",
            "CUDA_VISIBLE_DEVICES= hides them all; unset it",
        ),
        (FINE, {"CUDA_VISIBLE_DEVICES": "-1"}, "this machine has 2 GPUs", "CUDA_VISIBLE_DEVICES=-1 hides them all"),
        (FINE, {"CUDA_VISIBLE_DEVICES": "7"}, "CUDA_VISIBLE_DEVICES=7, and", "CUDA_VISIBLE_DEVICES=7 selects none"),
        (FINE, {}, "this machine has 2 GPUs", "nvidia-smi"),
        (NONE, {"SLURM_GPUS_ON_NODE": "2"}, "SLURM gave GPUs to this job (SLURM_GPUS_ON_NODE=2)", "no NVIDIA driver"),
        (NONE, {"SLURM_JOB_GPUS": "0,1"}, "SLURM gave GPUs to this job (SLURM_JOB_GPUS=0,1)", "no NVIDIA driver"),
        (
            NONE,
            {"SLURM_GPUS_PER_TASK": "a100:1", "CUDA_VISIBLE_DEVICES": ""},
            "SLURM gave",
            "CUDA_VISIBLE_DEVICES= hides",
        ),
        (NONE, {"CUDA_VISIBLE_DEVICES": "0"}, "CUDA_VISIBLE_DEVICES=0, and torch sees no GPU", "no NVIDIA driver"),
    ],
)
def test_gpus_that_were_given_and_are_not_seen_are_an_error_that_says_why(
    facts: GpuFacts, environment: dict[str, str], sign: str, reason: str
) -> None:
    with pytest.raises(WorldError) as caught:
        choose_device("auto", World(), facts, environment)
    line = str(caught.value)
    assert sign in line
    assert reason in line
    assert line.endswith("or train on the processor with engine.device=cpu")


def test_a_gpu_that_is_asked_for_must_be_there() -> None:
    line = r"^engine\.device=cuda, and torch sees no GPU: no NVIDIA driver can be loaded"
    with pytest.raises(WorldError, match=line):
        choose_device("cuda", World(), NONE, {})
    assert choose_device("cuda", World(), EIGHT, {}) == torch.device("cuda", 0)


def test_the_facts_of_this_machine_are_consistent() -> None:
    facts = gpu_facts()
    assert facts.count == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert facts.count == 0 or facts.driver is not None
    assert device_name(torch.device("cpu")) == "cpu"


def test_a_full_gpu_memory_is_one_line_with_the_settings_that_need_less() -> None:
    words = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB"
    with pytest.raises(TrainingError) as caught, out_of_memory_as_line():
        raise torch.OutOfMemoryError(words)
    line = str(caught.value)
    assert line.startswith("the GPU's memory is full (2.50 GiB more were needed); set a smaller engine.micro_batch")
    assert "engine.zero_stage" in line
    assert "data.clip_cache=host" in line
    with pytest.raises(RuntimeError, match="another"), out_of_memory_as_line():
        raise RuntimeError("another fault")


def test_hanging_collectives_leave_a_trace_at_a_local_path() -> None:
    variables = nccl_variables("/runs/s/nccl_trace_step_003_rank_")
    assert variables["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
    assert int(variables["TORCH_FR_BUFFER_SIZE"]) > 0
    assert variables["TORCH_FR_DUMP_TEMP_FILE"] == "/runs/s/nccl_trace_step_003_rank_"
    assert "TORCH_FR_DUMP_TEMP_FILE" not in nccl_variables("s3://bucket/trace")
    assert "TORCH_FR_DUMP_TEMP_FILE" not in nccl_variables(None)


def test_traces_are_beside_the_folder_of_the_snapshots() -> None:
    """They are no snapshots, and are not deleted with them."""
    config = load_config("demo", ["output=/runs"])
    assert trace_prefix(config, 3) == "/runs/demo-avcil-seed0/nccl_trace_step_003_rank_"
    assert snapshots_url(config, 3) == "/runs/demo-avcil-seed0/snapshots/step_003"
