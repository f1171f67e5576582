"""Class-incremental method: the interface between an algorithm and the step that trains it.

A method does not depend on ranks, storage or the engine. `needs` lists everything that it requires of a step; a step
provides nothing else. The outputs passed to `loss` are those of the *global* batch, gathered with gradient, so
a mean over rows is a mean over all ranks.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from avcil_dist.config.method_options import NoOptions
from avcil_dist.config.section import Section
from avcil_dist.errors import ArtifactError
from avcil_dist.models.network_spec import DEFAULT_SPEC, NetworkSpec
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario


@dataclass(frozen=True)
class Needs:
    """Requirements of a method that a step must provide. Step 0 never has a teacher or exemplars."""

    teacher: bool = False  # outputs of the previous step's network
    # Exemplars: in batches of their own beside the current clips (replay), or among the current clips (join).
    memory: Literal["none", "replay", "join"] = "none"
    selection: Literal["random", "herding"] = "random"  # exemplar selection as published
    means: bool = False  # features of all exemplars, passed to `end_step`
    stored_logits: bool = False  # logits of each exemplar, kept since it was stored: `Targets.stored`
    weighted_sampling: bool = False  # clips are drawn as often as `sampling_weights` sets
    divergence: bool = False  # divergence of the student's attention from the teacher's, on exemplars
    importance: bool = False  # the teacher's feature importance, from `importance_loss`; its head grows too
    both_modalities: bool = False  # sound and pictures
    all_data: bool = False  # training clips of all seen classes, not only of the new ones
    fresh_network: bool = False  # a new network in every step, not the previous step's weights
    whole_classes: bool = False  # all training clips of a class in its own step
    clip_features: bool = False  # features of the training clips of all classes, which the method keeps
    max_clips: int | None = None  # limit of these clips
    validation: bool = False  # validation clips of every class, also where the epoch is not selected by them
    calibration: bool = False  # logits of the validation clips of all seen classes, passed to `calibrate`
    untrained: bool = False  # the network before training is a candidate of the best epoch, as epoch 0
    training: Literal["every step", "first step", "never"] = "every step"  # steps that train by gradients
    network_spec: NetworkSpec = DEFAULT_SPEC  # network after the encoders

    def trains_at(self, step: int) -> bool:
        """Whether the network is trained by gradients at this step."""
        return self.training == "every step" or (self.training == "first step" and step == 0)


@dataclass(frozen=True)
class StepContext:
    """Position of a step in the class stream."""

    scenario: Scenario
    step: int

    @property
    def num_old(self) -> int:
        """Number of old classes, those of the teacher."""
        return self.scenario.num_old(self.step)

    @property
    def num_seen(self) -> int:
        """Number of seen classes, those of the network after the step."""
        return self.scenario.num_seen(self.step)

    @property
    def old_tasks(self) -> tuple[slice, ...]:
        """Slice of the head for each earlier step's classes."""
        return self.scenario.head_slices(self.step)[:-1]


class StoredLogits(NamedTuple):
    """Logits of exemplars from the network of the step that stored them: `values` (B, C) for the old classes.

    `is_known` (B, C) is false for the classes that came after that step, for current clips, and for exemplars that
    could not be read then; `values` are 0 there.
    """

    values: Tensor
    is_known: Tensor


@dataclass(frozen=True)
class Targets:
    """Labels (B,) of the global batch: `num_current` current clips first, then exemplars.

    With `memory="join"` exemplars count as current clips. `stored` has the logits of the same rows, from step 1 on if
    `needs.stored_logits`.
    """

    labels: Tensor
    num_current: int
    stored: StoredLogits | None = None


@dataclass(frozen=True)
class SamplingWeights:
    """Relative frequencies with which clips are drawn; only their ratios count. None is negative.

    `current` (C,) is the weight of each current clip of a class. `exemplars` has for each class those of its exemplars,
    in the order of the memory, the most important first; a class without exemplars has none. Clips with equal weights
    are drawn equally often, up to one time in an epoch. In batches of their own (`memory="replay"`), exemplars compare
    with exemplars alone, otherwise with the current clips too.
    """

    current: Sequence[float]
    exemplars: Sequence[Sequence[float]]


class Method(ABC):
    """Class-incremental algorithm."""

    # Model of the options; a method of another package that has some defines a class of this name in its body.
    Options: ClassVar[type[Section]] = NoOptions
    context: StepContext
    # Whether batches of equal shapes take equal kernels, with no look at numbers in between.
    has_static_loss = False

    def __init__(self, options: Any) -> None:
        self.options = options

    @property
    def needs(self) -> Needs:
        """Requirements that a step must provide."""
        return Needs()

    @property
    def anchor(self) -> "ClosedFormMethod | None":
        """Head in closed form, solved before training, whose scores the network adds to its logits."""
        return None

    def anchor_weights(self) -> Tensor:
        """Return the weights (F, C) of the network's anchor, once the head in closed form is solved."""
        raise AssertionError(f"{type(self).__name__} has an anchor and does not define anchor_weights")

    @property
    def takes_one_modality(self) -> bool:
        """Whether `scores` takes outputs without sound or without pictures, after training on both."""
        return False

    def begin_step(self, context: StepContext) -> None:
        """Begin a step. Called after the previous step's state is loaded, before the head grows."""
        self.context = context

    def imprint(self, features: Sequence[Tensor], norm: float) -> Tensor:
        """Return proxies (new classes · proxies, D) from each new class's features (clips, D), before training.

        `norm` is the mean length of the old proxies. Called only for a head of proxies.
        """
        raise AssertionError(f"{type(self).__name__} needs a head of proxies and does not define imprint")

    def sampling_weights(self, current: Sequence[int], exemplars: Sequence[int]) -> SamplingWeights:
        """Return the weights of a step's training clips, from their numbers in each seen class (C,).

        Called before training, if `needs.weighted_sampling`; by one rank, for all. A function of its arguments and of
        the method's state alone, so that a step that continues draws the same clips.
        """
        raise AssertionError(f"{type(self).__name__} needs weighted sampling and does not define sampling_weights")

    def begin_training(self, expected_counts: Tensor, num_batches: int) -> None:  # noqa: B027 - most weight no classes
        """Begin the training by gradients.

        `expected_counts` (C,) are the clips of each class in a mean batch, one of the `num_batches` of an epoch.
        """

    @abstractmethod
    def loss(self, targets: Targets, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Return the total as "loss", a scalar to minimise, and its terms by name."""

    def importance_loss(self, labels: Tensor, output: Output) -> Tensor:
        """Return the teacher's loss of each clip (B,).

        The importance is the norm of its gradient with respect to each of `output.features()`.
        """
        raise AssertionError(f"{type(self).__name__} needs importance and does not define importance_loss")

    def calibrate(self, logits: Tensor, labels: Tensor) -> list[float]:
        """Return numbers for `committed_weights`, from logits (N, C) and labels (N,) of validation clips.

        Called after training, from step 1 on, if `needs.calibration`; by one rank, for all.
        """
        raise AssertionError(f"{type(self).__name__} needs calibration and does not define calibrate")

    def committed_weights(self, weights: Mapping[str, Tensor], calibration: Sequence[float]) -> dict[str, Tensor]:
        """Return the weights that the step commits, from those of the selected epoch, by name.

        `weights` are in memory that the ranks of a node share, and must not be changed.

        `calibration` are the numbers of `calibrate`, none where it is not called.
        """
        return dict(weights)

    def end_step(self, exemplars: Sequence[Tensor] | None) -> None:  # noqa: B027 - most methods do nothing then
        """End a step. Called after the epoch is selected and the memory updated, before the test.

        `exemplars` are the features (exemplars, D) of each seen class if `needs.means`, otherwise None.
        """

    def scores(self, output: Output) -> Tensor:
        """Return class scores (B, C); the largest is the prediction. Also used in training, to select the epoch."""
        return output.logits

    def restore(self, state: Mapping[str, Any], num_seen: int, source: str) -> None:
        """Load the state of a step with `num_seen` classes.

        Raises ArtifactError, naming `source`, for a state that does not fit.
        """
        try:
            self.load_state_dict(state)
            self.check_state(num_seen)
        except ValueError as error:
            raise ArtifactError(f"{source}: the method's state does not fit ({error}); run the step again") from None

    def check_state(self, num_seen: int) -> None:  # noqa: B027 - most methods have no state
        """Check a loaded state of `num_seen` classes. Raises ValueError for wrong types, shapes or numbers."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain JSON values that the next step needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the result of `state_dict`. Raises ValueError for a state that the method does not have."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, but the artifact has {', '.join(state)}")


def check_matrix(
    name: str, values: Any, dtype: torch.dtype, *, rows: int | None = None, columns: int | None = None
) -> Tensor:
    """Return a value of a state if it is a matrix of this type and shape. Raises ValueError otherwise."""
    if not isinstance(values, Tensor) or values.dtype != dtype or values.ndim != 2:
        raise ValueError(f"{name}: not a matrix of {dtype}")
    if values.shape[0] != (rows or values.shape[0]) or values.shape[1] != (columns or values.shape[1]):
        raise ValueError(f"{name}: a matrix of {tuple(values.shape)}, not of {(rows, columns)}")
    return values


class Ranks(Protocol):
    """Ranks that solve for a head together. All of them call each function, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this rank."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    def add_up(self, values: Tensor) -> None:
        """Replace `values` by their sum over the ranks."""

    def share(self, values: Tensor, source: int) -> None:
        """Replace `values` by those of rank `source`."""

    def make_together(self, make: Callable[[], Tensor]) -> Tensor:
        """Return on all ranks the tensor that `make` returns on rank 0."""


class OneRank:
    """`Ranks` of a single process."""

    rank, size = 0, 1

    def add_up(self, values: Tensor) -> None:
        """Leave the values as they are."""

    def share(self, values: Tensor, source: int) -> None:
        """Leave the values as they are."""

    def make_together(self, make: Callable[[], Tensor]) -> Tensor:
        """Return the made tensor."""
        return make()


class ClosedFormMethod(Method):
    """Method with a classifier in closed form from statistics that are sums over clips: one pass, no gradient.

    In each step: `begin_sums`; `accumulate` for each batch of the rank's clips; the step adds up the `statistics` of
    all ranks; `solve`; `choose` one of the candidates by validation clips.
    """

    # Whether `accumulate` gets the clips of all ranks, in the order of the plan; otherwise those of its rank.
    gathers = False
    remark = ""  # line about the last solution, for people

    def begin_sums(self, counts: Mapping[int, int]) -> None:
        """Begin the pass over this step's clips. `counts` are the training clips of each new class, by label."""

    @abstractmethod
    def accumulate(self, output: Output, labels: Tensor) -> None:
        """Add these clips (B rows) to the statistics of this step."""

    @abstractmethod
    def statistics(self) -> list[Tensor]:
        """Return the statistics of this step's clips, to be summed over ranks in place."""

    @abstractmethod
    def solve(self) -> Tensor:
        """Return candidate classifiers, stacked, from the statistics of all ranks."""

    def solve_together(self, ranks: Ranks) -> Tensor:
        """Return the result of `solve` on all ranks: by default that of rank 0, with the same last digit on all."""
        return ranks.make_together(self.solve)

    @abstractmethod
    def candidate_scores(self, output: Output, candidates: Tensor) -> Tensor:
        """Return class scores of every candidate, (candidates, B, C)."""

    @abstractmethod
    def choose(self, candidates: Tensor, accuracies: Sequence[float]) -> None:
        """Keep the candidate with the highest accuracy on validation clips; the first if `accuracies` is empty."""
