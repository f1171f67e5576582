"""DeepSpeed around the student, for the length of one step.

The head has grown before the engine is built: a head put in later would never be updated.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from avcil_dist.config.schema import EngineConfig
from avcil_dist.errors import TrainingError
from avcil_dist.models.network import Network
from avcil_dist.models.outputs import Output
from avcil_dist.training.optim import LossScale
from avcil_dist.world import World, threads_per_rank

NEVER = 10**9
# Numbers of a buffer of ZeRO's. Its own are for models of billions: below that, it shares out next to nothing.
BUCKET = 20_000_000
BETTER_GRADIENT = "lower optim.lr, set engine.max_grad_norm, or use engine.precision=float32 or bf16"


class Engine:
    """The student, its optimizer, and their distribution over ranks.

    Weights and the optimizer are float32; the network computes in its own precision.
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
        """`rows` is the number of clips that a rank has at a time; an iteration may have several such micro-batches."""
        deepspeed = import_deepspeed(world)
        self._trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._optimizer = optimizer
        self._engine = deepspeed.initialize(
            model=network.to(device),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": rows,
                "gradient_accumulation_steps": 1,
                "gradient_clipping": config.max_grad_norm or 0.0,
                "zero_optimization": _zero_section(config),
                # Its own Adam for host memory is compiled at run time; torch's is as good there, and the same bits.
                "zero_force_ds_cpu_optimizer": False,
                "steps_per_print": NEVER,
            },
            dist_init_required=False,
        )[0]
        self.zero_stage, self.rows = config.zero_stage, rows
        self._scale = LossScale() if network.precision == "fp16" else None
        self._check_covered()

    @property
    def network(self) -> Network:
        """The student as it stands; at ZeRO 3 its parameters are whole only inside a forward pass."""
        network: Network = self._engine.module
        return network

    def __call__(self, *inputs: Any) -> Output:
        """A forward pass with gradient."""
        output: Output = self._engine(*inputs)
        return output

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Gradients of the loss, summed over what each rank's rows gave to it, added to those at hand.

        `is_last` is false for all but the last micro-batch of an iteration: until then gradients are kept.
        """
        self._engine.set_gradient_accumulation_boundary(is_last)
        if self._scale:
            if self.zero_stage:
                self._engine.optimizer.override_loss_scale(self._scale.value)
            else:
                loss = loss * self._scale.value
        self._engine.backward(loss)

    def step(self) -> bool:
        """The optimizer's step; gradients are cleared. False when they were not finite: then no weight has moved.

        In float32 and bf16, ZeRO 0 does not look, and the next loss is not finite. Raises TrainingError where a
        smaller scale of the loss, which fp16 tries at the next step, cannot help.
        """
        is_finite = self._unscale(1 / self._scale.value) if self._scale and self.zero_stage == 0 else True
        self._engine.step()
        if self.zero_stage == 3:
            # A parameter that the next iteration does not use would take this one's gradient again.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        if self.zero_stage:
            is_finite = not self._engine.optimizer.overflow
        if self._scale:
            if not is_finite and self._scale.is_smallest:
                raise TrainingError(f"the gradient overflows in fp16 whatever the scale of the loss; {BETTER_GRADIENT}")
            self._scale.update(overflowed=not is_finite)
        return is_finite

    def state(self) -> dict[str, Tensor]:
        """All of the student's weights and buffers, whole, in host memory, on every rank."""
        self._check_covered()
        return whole_state(self.network)

    def _unscale(self, factor: float) -> bool:
        """Multiply all gradients; where one is not finite, drop them, so that the step does nothing, and say False."""
        gradients = [parameter.grad for parameter in self._trainable if parameter.grad is not None]
        is_finite = bool(torch.stack([gradient.isfinite().all() for gradient in gradients]).all())
        if not is_finite:
            self._engine.zero_grad()
        for gradient in gradients:
            gradient.mul_(factor)
        return is_finite

    def _check_covered(self) -> None:
        """Every trainable parameter is in the optimizer: one put in after the engine was built never moves."""
        groups: dict[int, Any] = {0: [group["params"] for group in self._optimizer.param_groups]}
        if self.zero_stage:
            groups[self.zero_stage] = getattr(
                self._engine.optimizer, "fp16_groups" if self.zero_stage == 3 else "bit16_groups"
            )
        covered = {id(parameter) for group in groups[self.zero_stage] for parameter in group}
        trainable = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        missing = [name for name, value in trainable.items() if id(value) not in covered]
        assert not missing, f"not in the optimizer: {', '.join(missing)}"

    def optimizer_state(self) -> dict[str, Tensor | float]:
        """What the rank's optimizer has gathered over the steps, in host memory, tensors and plain numbers.

        Of the rank's own share, where ZeRO shares it out: it goes with the ZeRO stage, the world size and the rank.
        """
        with self._whole_groups():
            state = self._optimizer.state_dict()["state"]
        scale = asdict(self._scale) if self._scale else {}
        return {f"loss_scale.{name}": value for name, value in scale.items()} | {
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
            owner, name = key.split(".", 1)
            if owner == "loss_scale":
                setattr(self._scale, name, value)
            else:
                values.setdefault(int(owner), {})[name] = value
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
        release(self._engine)


def whole_state(network: Network) -> dict[str, Tensor]:
    """A copy of a network's weights and buffers in host memory; all ranks call it, where ZeRO 3 shares them out."""
    state = {}
    for name, value in network.state_dict(keep_vars=True).items():
        with _whole(value):
            state[name] = value.detach().cpu().clone()
    return state


def release(engine: Any) -> None:
    """Let go of a DeepSpeed engine; at ZeRO 3 it would stay, with its network, as long as the process."""
    engine.destroy()
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not engine.module]


def shard_out(network: Network, world: World) -> Any:
    """Share the parameters of a network that is not trained out to the ranks; a module's are whole while it runs.

    The network is used as before, except that all ranks must call it together. Returns the engine, to release.
    """
    return import_deepspeed(world).initialize(
        model=network,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "steps_per_print": NEVER,
        },
        dist_init_required=False,
    )[0]


def _whole(value: Tensor) -> AbstractContextManager[object]:
    """A block in which a tensor that ZeRO 3 may have shared out is whole, one at a time to spare memory."""
    if not hasattr(value, "ds_id"):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[object] = deepspeed.zero.GatheredParameters([value])
    return gathered


def _zero_section(config: EngineConfig) -> dict[str, Any]:
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


def name_accelerator() -> None:
    """Tell DeepSpeed what it would guess with a warning; it looks when it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


def import_deepspeed(world: World) -> Any:
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
