"""What a class-incremental method is: the interface between an algorithm and the step that trains it.

A method never sees ranks, storage or the engine. The outputs that `loss` is given are those of
the *global* batch, gathered with gradient, so a mean over rows is a mean over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from avcil_dist.config import Section
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario


@dataclass(frozen=True)
class Needs:
    """What a step must provide. A step 0 has no teacher and no exemplars, whatever a method needs."""

    teacher: bool = False
    replay: bool = False
    divergence: bool = False
    all_data: bool = False
    fresh_network: bool = False


@dataclass(frozen=True)
class StepContext:
    """Where in the class stream the method is."""

    scenario: Scenario
    step: int

    @property
    def num_old(self) -> int:
        """Classes that the teacher knows."""
        return self.scenario.num_old(self.step)

    @property
    def old_tasks(self) -> tuple[slice, ...]:
        """The head's slice of each earlier step."""
        return self.scenario.head_slices(self.step)[:-1]


@dataclass(frozen=True)
class Targets:
    """Labels (B,) of the global batch: `num_current` current clips first, then exemplars."""

    labels: Tensor
    num_current: int


class Method(ABC):
    """A class-incremental algorithm."""

    class Options(Section):
        """The method's settings; a method with settings has its own."""

    context: StepContext

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def needs(self) -> Needs:
        """What the method asks of a step."""
        return Needs()

    def begin_step(self, context: StepContext) -> None:
        """Called before the network grows."""
        self.context = context

    @abstractmethod
    def loss(self, targets: Targets, output: Output, teacher_logits: Tensor | None) -> dict[str, Tensor]:
        """`loss`, a scalar to minimise, and its parts by name."""

    def end_step(self, context: StepContext) -> None:
        """Called with the step's weights selected, before they are written."""
        assert context == self.context

    def scores(self, output: Output) -> Tensor:
        """Class scores (B, C); the prediction is the largest."""
        return output.logits

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain JSON values that the next step needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, was given {', '.join(state)}")
