"""A method's loss and its gradient as one CUDA graph, for batches without damaged clips.

A loss consists of about a hundred kernels of a microsecond each, forward and backward. Launched one by one, they take
longer than the attention. The graph runs the same kernels on the same values, so the bits are the same.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.methods.base import Method, StoredLogits, Targets
from avcil_dist.models.outputs import Output

WARM_UP = 3  # runs before the capture, which load and initialise libraries

_graphs: WeakKeyDictionary[Method, dict[Any, "LossGraph"]] = WeakKeyDictionary()


def method_loss(method: Method, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
    """Return `method.loss`, by a CUDA graph if the method allows that and the batch is on a GPU."""
    if not method.has_static_loss or targets.labels.device.type != "cuda" or not torch.is_grad_enabled():
        return method.loss(targets, output, teacher)
    inputs = [*output.tensors(), *(teacher.tensors() if teacher else ())]
    specs = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in inputs)
    key = (
        method.context.step,
        targets.num_current,
        len(targets.labels),
        teacher is None,
        targets.stored is None,
        specs,
    )
    graphs = _graphs.setdefault(method, {})
    if key not in graphs:
        graphs[key] = LossGraph(method, targets, output, teacher)
    return graphs[key](targets, output, teacher)


class LossGraph:
    """CUDA graph of the loss and its gradient, for batches of one shape, with buffers for inputs and results."""

    def __init__(self, method: Method, targets: Targets, output: Output, teacher: Output | None) -> None:
        def buffer(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        stored = targets.stored and StoredLogits(*(values.clone() for values in targets.stored))
        self._targets = Targets(targets.labels.clone(), targets.num_current, stored)
        self._output, self._teacher = output.map(buffer), teacher and teacher.map(buffer)
        self._inputs = [tensor.detach() for tensor in self._tensors(self._targets, self._output, self._teacher)]
        self.names: list[str] = []
        self.num_calls = 0
        self._replay = capture(lambda: self._compute(method))

    @staticmethod
    def _tensors(targets: Targets, output: Output, teacher: Output | None) -> list[Tensor]:
        return [*output.tensors(), targets.labels, *(targets.stored or ()), *(teacher.tensors() if teacher else ())]

    def _compute(self, method: Method) -> None:
        parts = method.loss(self._targets, self._output, self._teacher)
        self.names = list(parts)
        with_gradient = [tensor for tensor in self._output.tensors() if tensor.requires_grad]
        self.gradients = torch.autograd.grad(parts["loss"], with_gradient, allow_unused=True)
        self.values = torch.stack([value.detach() for value in parts.values()])

    def __call__(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return the loss, with gradient, and its parts."""
        torch._foreach_copy_(self._inputs, [t.detach() for t in self._tensors(targets, output, teacher)])
        self._replay()
        self.num_calls += 1
        parts = dict(zip(self.names, self.values.clone().unbind(), strict=True))
        with_gradient = [tensor for tensor in output.tensors() if tensor.requires_grad]
        return parts | {"loss": _Loss.apply(self, parts["loss"], *with_gradient)}


class _Loss(torch.autograd.Function):
    """Loss of a graph's last batch; its gradient is in the graph's buffers until the next batch."""

    @staticmethod
    def forward(context: Any, graph: LossGraph, loss: Tensor, *_: Tensor) -> Tensor:
        """Return the computed loss."""
        context.graph, context.call = graph, graph.num_calls
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, loss_grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients by that of the loss. Raises RuntimeError if a later batch has overwritten them."""
        graph: LossGraph = context.graph
        if context.call != graph.num_calls:
            raise RuntimeError(
                "the loss of another batch was computed before this one's backward, which overwrote its gradient"
            )
        scaled = iter(torch._foreach_mul([part for part in graph.gradients if part is not None], loss_grad))
        return None, None, *(None if part is None else next(scaled) for part in graph.gradients)


def capture(compute: Callable[[], None]) -> Callable[[], None]:
    """Capture the kernels of `compute`; return a function that runs them again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, of loaders and NCCL, may make calls that are forbidden to this thread during the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay
