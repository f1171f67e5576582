"""A method's loss and its gradient as one CUDA graph, for batches without damaged clips.

A loss is some hundred kernels of a microsecond each, forward and backward; started one by one they take longer than
the attention computes. The graph runs the same kernels on the same numbers, so the bits are the same.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from avcil_dist.methods.base import Method, Targets
from avcil_dist.models.outputs import Output

WARM_UP = 3  # runs before the capture, in which libraries are loaded and set up

_graphs: WeakKeyDictionary[Method, dict[Any, "LossGraph"]] = WeakKeyDictionary()


def method_loss(method: Method, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
    """`method.loss`, by a graph where the method allows that and the batch is on a GPU."""
    if not method.has_static_loss or targets.labels.device.type != "cuda" or not torch.is_grad_enabled():
        return method.loss(targets, output, teacher)
    tensors = [*output.tensors(), *(teacher.tensors() if teacher else ())]
    kinds = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
    key = (method.context.step, targets.num_current, len(targets.labels), teacher is None, kinds)
    graphs = _graphs.setdefault(method, {})
    if key not in graphs:
        graphs[key] = LossGraph(method, targets, output, teacher)
    return graphs[key](targets, output, teacher)


class LossGraph:
    """The loss of batches of one shape; inputs, parts and gradients have places of their own."""

    def __init__(self, method: Method, targets: Targets, output: Output, teacher: Output | None) -> None:
        def placed(tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)

        self._targets = Targets(targets.labels.clone(), targets.num_current)
        self._output, self._teacher = output.map(placed), teacher and teacher.map(placed)
        self._places = [place.detach() for place in self._tensors(self._targets, self._output, self._teacher)]
        self.names: list[str] = []
        self.number = 0
        self._replay = capture(lambda: self._compute(method))

    @staticmethod
    def _tensors(targets: Targets, output: Output, teacher: Output | None) -> list[Tensor]:
        return [*output.tensors(), targets.labels, *(teacher.tensors() if teacher else ())]

    def _compute(self, method: Method) -> None:
        parts = method.loss(self._targets, self._output, self._teacher)
        self.names = list(parts)
        wanted = [tensor for tensor in self._output.tensors() if tensor.requires_grad]
        self.gradients = torch.autograd.grad(parts["loss"], wanted, allow_unused=True)
        self.values = torch.stack([value.detach() for value in parts.values()])

    def __call__(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """The loss, with gradient, and its parts."""
        torch._foreach_copy_(self._places, [t.detach() for t in self._tensors(targets, output, teacher)])
        self._replay()
        self.number += 1
        parts = dict(zip(self.names, self.values.clone().unbind(), strict=True))
        wanted = [tensor for tensor in output.tensors() if tensor.requires_grad]
        return parts | {"loss": _Loss.apply(self, parts["loss"], *wanted)}


class _Loss(torch.autograd.Function):
    """The loss; its gradient lies in the graph's place until the next batch."""

    @staticmethod
    def forward(context: Any, graph: LossGraph, loss: Tensor, *_: Tensor) -> Tensor:
        """Nothing is left to compute."""
        context.graph, context.number = graph, graph.number
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(context: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients times that of the loss. Raises RuntimeError when another batch has taken their place."""
        graph: LossGraph = context.graph
        if context.number != graph.number:
            raise RuntimeError("the loss of another batch was computed before this one's backward")
        found = iter(torch._foreach_mul([part for part in graph.gradients if part is not None], of_loss))
        return None, None, *(None if part is None else next(found) for part in graph.gradients)


def capture(compute: Callable[[], None]) -> Callable[[], None]:
    """A function that runs the kernels of `compute` again."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Other threads, of loaders and of NCCL, may call what this one must not while it captures.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay
