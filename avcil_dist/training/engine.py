"""DeepSpeed around the student, for the length of one step.

The head has grown before the engine is built: a head put in later would never be updated.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.config import EngineConfig, OptimConfig
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.world import World

NEVER = 10**9


class Engine:
    """The student, its optimizer, and their distribution over ranks."""

    def __init__(
        self,
        network: Network,
        *,
        optim: OptimConfig,
        config: EngineConfig,
        rows: int,
        world: World,
        device: torch.device,
    ) -> None:
        """`rows` is the number of clips that a rank has of a global batch."""
        deepspeed = _deepspeed(world)
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._optimizer = optimizer = torch.optim.Adam(
            trainable, lr=optim.lr, weight_decay=optim.weight_decay, fused=device.type == "cuda"
        )
        self._engine = deepspeed.initialize(
            model=network.to(device),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": 1,
                "zero_optimization": {"stage": config.zero_stage},
                "steps_per_print": NEVER,
            },
            dist_init_required=False,
        )[0]
        in_optimizer = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        assert config.zero_stage or all(id(parameter) in in_optimizer for parameter in trainable)
        self.zero_stage = config.zero_stage
        self._deepspeed = deepspeed

    @property
    def network(self) -> Network:
        """The student as it stands; at ZeRO 3 its parameters are whole only inside a forward pass."""
        network: Network = self._engine.module
        return network

    def __call__(self, *inputs: Any) -> Output:
        """A forward pass with gradient."""
        output: Output = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor) -> None:
        """Gradients of the loss, summed over what each rank's rows gave to it."""
        self._engine.backward(loss)

    def step(self) -> None:
        """The optimizer's step; gradients are cleared."""
        self._engine.step()

    def state(self) -> dict[str, Tensor]:
        """All of the student's weights and buffers, whole, in host memory, on every rank."""
        if self.zero_stage < 3:
            return whole_state(self.network)
        with self._deepspeed.zero.GatheredParameters(list(self.network.parameters())):
            return whole_state(self.network)

    def optimizer_state(self) -> dict[str, Tensor | float]:
        """What the rank's optimizer has gathered over the steps, in host memory, tensors and plain numbers.

        Of the rank's own share, where ZeRO shares it out: it goes with the ZeRO stage, the world size and the rank.
        """
        with self._whole_groups():
            state = self._optimizer.state_dict()["state"]
        return {
            f"{number}.{name}": value.detach().cpu().clone() if isinstance(value, Tensor) else value
            for number, values in state.items()
            for name, value in values.items()
        }

    def load_optimizer_state(self, state: Mapping[str, Tensor | float]) -> None:
        """Go on from `optimizer_state()` of the same rank, ZeRO stage and world size.

        An engine that was built on the weights of then goes on as that one would have, to the last bit.
        """
        values: dict[int, dict[str, Tensor | float]] = {}
        for key, value in state.items():
            number, name = key.split(".", 1)
            values.setdefault(int(number), {})[name] = value
        with self._whole_groups():
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": values, "param_groups": groups})

    @contextmanager
    def _whole_groups(self) -> Iterator[None]:
        """The optimizer with its parameters: ZeRO 3 puts them in only while it takes a step."""
        if self.zero_stage < 3:
            yield
            return
        self._engine.optimizer._set_fp32_optimizer_param_groups()
        try:
            yield
        finally:
            self._engine.optimizer._clear_fp32_optimizer_param_groups()

    def close(self) -> None:
        """Give back what the engine holds."""
        self._engine.destroy()


def whole_state(network: Network) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers in host memory."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def set_threads(world: World) -> None:
    """Share the machine's cores among its ranks; more threads than cores make all of them slow."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))


def name_accelerator() -> None:
    """Tell DeepSpeed what it would guess with a warning; it looks when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def _deepspeed(world: World) -> Any:
    """DeepSpeed, imported late (it takes seconds), joined to the process group, and without its chatter."""
    for module in ("torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    name_accelerator()
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # where DeepSpeed looks for the rank's device
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not deepspeed.comm.is_initialized():
        # An all-reduce for inference alone; every new process would compile it, or wait for another that does.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed
