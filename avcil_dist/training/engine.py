"""DeepSpeed engine of the student for one step.

The head must have grown before the engine is built: parameters added later are never updated.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from avcil_dist.config.schema import EngineConfig
from avcil_dist.errors import ArtifactError, TrainingError
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.streams.tensor_parts import RESTART, Parts, part_key, share, split_key
from avcil_dist.system.accelerator import VARIABLE, name_accelerator
from avcil_dist.training.deepspeed_private import (
    Place,
    clear_gradients,
    covered_parameters,
    disable_compiled_all_reduce,
    forget,
    has_overflowed,
    set_loss_scale,
    zero_places,
)
from avcil_dist.training.optim import LossScale
from avcil_dist.training.optimizer_parts import load_optimizer_parts, optimizer_parts
from avcil_dist.training.rank_environment import set_deepspeed_variables
from avcil_dist.training.weights import weight_parts
from avcil_dist.world import World, threads_per_rank

NEVER = 10**9
# Elements of a ZeRO buffer. DeepSpeed's default is for billions of parameters and hardly shards smaller models.
BUCKET = 20_000_000
LOSS_SCALE = "loss_scale"
BETTER_GRADIENT = "lower optim.lr, set engine.max_grad_norm, or use engine.precision=float32 or bf16"


class Engine:
    """The student and its optimizer, distributed over the ranks.

    Weights and optimizer state are float32; the network computes in its own precision.
    """

    def __init__(
        self,
        network: Network,
        optimizer: torch.optim.Optimizer,
        *,
        config: EngineConfig,
        rows: int,
        world: World,
        device: torch.device,
    ) -> None:
        """Build the engine. `rows` is the number of clips in a micro-batch of a rank."""
        deepspeed = initialised_deepspeed(world, device)
        self._trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._sizes = {name: value.numel() for name, value in network.named_parameters() if value.requires_grad}
        self._world = world
        self._optimizer = optimizer
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._engine = deepspeed.initialize(
            model=network.to(device),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm or 0.0,
                "zero_optimization": zero_section(config),
                # DeepSpeed's Adam for host memory is compiled at run time; torch's is as fast and gives the same bits.
                "zero_force_ds_cpu_optimizer": False,
                "zero_allow_untested_optimizer": True,  # SGD; tests compare all ZeRO stages
                "steps_per_print": NEVER,
            },
            dist_init_required=False,
        )[0]
        if config.zero_stage == 0 and world.size == 1:
            self._engine.enable_backward_allreduce = False  # it would pack and unpack gradients for nobody
        self.zero_stage, self.rows = config.zero_stage, rows
        self._scale = LossScale() if network.precision == "fp16" else None
        self.gradient_norm: float | Tensor | None = None
        self._check_covered()

    @property
    def network(self) -> Network:
        """The student. At ZeRO 3 its parameters are whole only inside a forward pass."""
        network: Network = self._engine.module
        return network

    def __call__(self, *inputs: Any) -> Output:
        """Run a forward pass with gradient."""
        output: Output = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Backpropagate `loss` and accumulate into the gradients, which are summed over ranks.

        All ranks share one global loss. `is_last` is false for all but the last micro-batch of an iteration.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        if self._scale:
            if self.zero_stage:
                set_loss_scale(self._engine, self._scale.value)
            else:
                loss = loss * self._scale.value
        self._engine.backward(loss)

    def scale_rates(self, factor: float) -> None:
        """Set the learning rate of each group of parameters to `factor` times its initial one."""
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def step(self, *, with_norm: bool = False) -> bool:
        """Update the weights and clear the gradients. Returns False, without an update, for infinite gradients or NaN.

        With `with_norm`, `gradient_norm` is then the norm of the gradient of all weights, before it is clipped.

        In float32 and bf16, ZeRO 0 does not check them: the next loss is then not finite. Raises TrainingError when
        gradients overflow in fp16 at the smallest loss scale.
        """
        is_finite = self._unscale(1 / self._scale.value) if self._scale and self.zero_stage == 0 else True
        self.gradient_norm = self._norm() if with_norm and self.zero_stage == 0 else None
        self._engine.step()
        if self.zero_stage == 3:
            clear_gradients(self._engine)
        if self.zero_stage:
            is_finite = not has_overflowed(self._engine)
            self.gradient_norm = self._engine.get_global_grad_norm() if with_norm else None
        if self._scale:
            if not is_finite and self._scale.is_smallest:
                raise TrainingError(f"the gradient overflows in fp16 at any loss scale; {BETTER_GRADIENT}")
            self._scale.update(overflowed=not is_finite)
        return is_finite

    def weight_parts(self) -> dict[str, Tensor]:
        """Return this rank's parts of the student's weights and buffers: views, valid until the next step."""
        self._check_covered()
        return weight_parts(self.network, self._world)

    def _norm(self) -> Tensor:
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        norm: Tensor = nn.utils.get_total_norm(gradients)
        return norm

    def _unscale(self, factor: float) -> bool:
        """Multiply all gradients by `factor`. Clears them and returns False when one is not finite."""
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        is_finite = bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
        if not is_finite:
            self._engine.zero_grad()
        for gradient in gradients:
            gradient.mul_(factor)
        return is_finite

    def _check_covered(self) -> None:
        """Assert that every trainable parameter is in the optimizer: one added later would never be updated."""
        parameters = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        if self.zero_stage:
            parameters = list(covered_parameters(self._engine, self.zero_stage))
        covered = {id(parameter) for parameter in parameters}
        trainable = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        missing = [name for name, value in trainable.items() if id(value) not in covered]
        assert not missing, f"not in the optimizer: {', '.join(missing)}"

    def optimizer_parts(self) -> dict[str, Tensor]:
        """Return this rank's parts of the optimizer's state, views, and the loss scale."""
        scale = asdict(self._scale) if self._scale else {}
        return {
            part_key(f"{LOSS_SCALE}/{name}", 0): torch.tensor([value], dtype=torch.float64)
            for name, value in scale.items()
        } | optimizer_parts(self._optimizer, self._places(cut=True))

    def load_optimizer(self, files: Iterable[Parts], source: str) -> None:
        """Load the state of all ranks' `optimizer_parts()`, of any number of ranks and any ZeRO stage.

        `files` are read until this rank's state is there. With the weights of that moment too, training continues: to
        the same bits on the same number of ranks. Raises ArtifactError, naming `source`, for any other state.
        """
        without_scale = (self._load_scale(parts, source) for parts in files)
        load_optimizer_parts(self._optimizer, self._places(), self._sizes, without_scale, source)

    def _load_scale(self, parts: Parts, source: str) -> dict[str, Tensor]:
        """Load the loss scale, if it is among `parts`, and return the others."""
        others, names = {}, set(asdict(self._scale)) if self._scale else set()
        for key, values in parts.items():
            name, _ = split_key(key, source)
            if not name.startswith(f"{LOSS_SCALE}/"):
                others[key] = values
            elif (name := name.removeprefix(f"{LOSS_SCALE}/")) in names and values.numel() == 1:
                setattr(self._scale, name, type(getattr(self._scale, name))(values.item()))
            else:
                raise ArtifactError(f"{source}: {key} is not of this optimizer; {RESTART}")
        return others

    def _places(self, *, cut: bool = False) -> dict[str, Place]:
        """The places of this rank's parameters in the optimizer.

        Without ZeRO each rank has all of them: if `cut`, only its share, so that each element is in one rank's.
        """
        parameters = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        if self.zero_stage:
            return zero_places(self._engine, self.zero_stage, self._optimizer, parameters, self._world.rank)
        rank, size = (self._world.rank, self._world.size) if cut else (0, 1)
        ranges = share(self._sizes, rank, size)
        return {name: Place(parameters[name], start, start, count) for name, (start, count) in ranges.items()}

    def close(self) -> None:
        """Release the engine's memory."""
        release(self._engine)


def release(engine: Any) -> None:
    """Release the memory of a DeepSpeed engine."""
    engine.destroy()
    forget(engine)


def shard_out(network: Network, world: World) -> Any:
    """Shard the parameters of a network that is not trained over the ranks, by ZeRO 3.

    A module's parameters are whole while it runs. All ranks must call the network together. Returns the engine.
    """
    return initialised_deepspeed(world, next(network.parameters()).device).initialize(
        model=network,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "steps_per_print": NEVER,
        },
        dist_init_required=False,
    )[0]


def zero_section(config: EngineConfig) -> dict[str, Any]:
    """Return the `zero_optimization` section of DeepSpeed's configuration."""
    section: dict[str, Any] = {
        "stage": config.zero_stage,
        "reduce_bucket_size": BUCKET,
        "allgather_bucket_size": BUCKET,
        "stage3_prefetch_bucket_size": BUCKET,
        "stage3_max_live_parameters": 2 * BUCKET,
        "stage3_max_reuse_distance": 0,
    }
    if config.offload != "none":
        section["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        section["offload_param"] = {"device": "cpu"}
    return section


def set_threads(world: World) -> None:
    """Set the number of torch's threads to this rank's share of the cores that the process may use."""
    torch.set_num_threads(threads_per_rank(world, os.environ, len(os.sched_getaffinity(0))))


def import_deepspeed(world: World, device: torch.device) -> Any:
    """Import DeepSpeed late (it takes seconds), without its log messages. It sets variables (`rank_environment.py`)."""
    for module in ("torch.distributed", "deepspeed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=module)
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    if VARIABLE not in os.environ:
        name_accelerator(device.type)
    set_deepspeed_variables(world, device)
    importlib.import_module("torch._dynamo")  # optimizers import it, and it sets a variable as well
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    return deepspeed


def initialised_deepspeed(world: World, device: torch.device) -> Any:
    """Import DeepSpeed and initialise it with the process group."""
    deepspeed = import_deepspeed(world, device)
    if not deepspeed.comm.is_initialized():
        disable_compiled_all_reduce(deepspeed)
        deepspeed.init_distributed(dist_backend=dist.get_backend(), dist_init_required=False, verbose=False)
    return deepspeed
