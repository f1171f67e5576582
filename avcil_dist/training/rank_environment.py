"""Environment of a rank: what gloo, NCCL and DeepSpeed read there. See `system/variables.py` for when to set it."""

import os

import torch

from avcil_dist.system.variables import set_missing_variables, set_variables, unset_variables
from avcil_dist.training.device import nccl_variables
from avcil_dist.training.rendezvous import interfaces
from avcil_dist.world import World

LOOPBACK_INTERFACE = "lo"
OPEN_MPI_PREFIX = "OMPI_COMM_WORLD_"


def set_network_variables(world: World, device: torch.device, trace: str | None = None) -> None:
    """Set what gloo and NCCL read, where the user has not set it. `trace` is as for `nccl_variables`."""
    if device.type == "cuda":
        set_missing_variables(nccl_variables(trace))
    if world.local_size == world.size and LOOPBACK_INTERFACE in interfaces():
        # Otherwise gloo looks up the host's name, which may stand for an address that this machine does not have.
        set_missing_variables({"GLOO_SOCKET_IFNAME": LOOPBACK_INTERFACE})


def set_deepspeed_variables(world: World, device: torch.device) -> None:
    """Set what DeepSpeed reads: the number of the rank's GPU on its machine.

    Where a scheduler shows each rank a GPU of its own, that is number 0 on all ranks.
    """
    set_variables({"LOCAL_RANK": str(world.local_rank if device.index is None else device.index)})
    # of an mpirun around this run, with which DeepSpeed compares it
    unset_variables([name for name in os.environ if name.startswith(OPEN_MPI_PREFIX)])
