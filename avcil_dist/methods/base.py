"""What a class-incremental method is: the interface between an algorithm and the step that trains it.

A method never sees ranks, storage or the engine. The outputs that `loss` is given are those of
the *global* batch, gathered with gradient, so a mean over rows is a mean over all ranks. What a
method wants of a step it says in `needs`; what it needs not, it is not given.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from avcil_dist.config.section import Section
from avcil_dist.models.network_spec import DEFAULT_SPEC, NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario


@dataclass(frozen=True)
class Needs:
    """What a step must provide. A step 0 has no teacher and no exemplars, whatever a method needs."""

    teacher: bool = False
    memory: Literal["none", "replay", "join"] = "none"  # exemplars beside the current clips, or among them
    selection: Literal["random", "herding"] = "random"  # of exemplars, as published
    means: bool = False  # the exemplars' features at the end of a step
    divergence: bool = False
    importance: bool = False  # the teacher's, through `importance_loss`; the teacher's head then grows too
    both_modalities: bool = False
    all_data: bool = False
    fresh_network: bool = False
    validation: bool = False  # clips of each class, whatever selects the epoch
    training: Literal["every step", "first step", "never"] = "every step"
    network_spec: NetworkSpec = DEFAULT_SPEC

    def trains_at(self, step: int) -> bool:
        """Whether the network is trained at this step, by gradients."""
        return self.training == "every step" or (self.training == "first step" and step == 0)


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
    def num_seen(self) -> int:
        """Classes that are known at the end of the step."""
        return self.scenario.num_seen(self.step)

    @property
    def old_tasks(self) -> tuple[slice, ...]:
        """The head's slice of each earlier step."""
        return self.scenario.head_slices(self.step)[:-1]


@dataclass(frozen=True)
class Targets:
    """Labels (B,) of the global batch: `num_current` current clips first, then exemplars.

    Exemplars that join the training clips are current clips.
    """

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
        """Called with the state of the step before loaded, before the network grows."""
        self.context = context

    def imprint(self, features: Sequence[Tensor], norm: float) -> Tensor:
        """Proxies (new classes · proxies, D) from each new class's features (clips, D), before training.

        `norm` is the mean length of the old proxies. Asked of a method whose head is of proxies.
        """
        raise AssertionError(f"{type(self).__name__} asks for proxies and makes none")

    @abstractmethod
    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """`loss`, a scalar to minimise, and its parts by name."""

    def importance_loss(self, labels: Tensor, output: Output) -> Tensor:
        """A teacher's loss of each clip (B,); the norms of its gradient by `output.features()` are the importance."""
        raise AssertionError(f"{type(self).__name__} asks for importance and names no loss")

    def end_step(self, exemplars: Sequence[Tensor] | None) -> None:  # noqa: B027 - most methods do nothing then
        """Called with the step's weights selected and the memory updated, before the test.

        `exemplars` are the features (exemplars, D) of each seen class, where the method needs means.
        """

    def scores(self, output: Output) -> Tensor:
        """Class scores (B, C); the prediction is the largest. Asked during training too, to select an epoch."""
        return output.logits

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain JSON values that the next step needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, was given {', '.join(state)}")


class ClosedFormMethod(Method):
    """A method whose classifier comes in closed form from sums over clips: one pass, no gradient.

    Each rank's method sums over its own clips; the step adds the ranks' sums up in between.
    """

    @abstractmethod
    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Add these clips (B rows) to the sums of this step."""

    @abstractmethod
    def statistics(self) -> list[Tensor]:
        """The sums of this step. The step replaces their content by that over all ranks."""

    @abstractmethod
    def solve(self) -> Tensor:
        """The candidate classifiers after this step, stacked; from sums that are whole."""

    @abstractmethod
    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """Class scores of every candidate, (candidates, B, C)."""

    @abstractmethod
    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the candidate that did best on the validation clips; the first, where there are no such clips."""
