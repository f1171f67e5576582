"""Kind of network that a method needs. The encoders come from the configuration."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from avcil_dist.models.extension import Extension


@dataclass(frozen=True)
class NetworkSpec:
    """The part of a network after its encoders.

    With `pool`, a grid of (frames, positions), that is only a mean over each cell of the grid of visual tokens: no
    attention, no projection, no head. Otherwise it is attention, projections and a head: `linear`, or `proxies`
    with `num_proxies` per class. With `anchor`, a number of parts of time, the logits have the fixed scores of sound
    and of visual tokens, pooled over these parts, added to them, and rows of the linear head begin as zeros.
    `extension` makes the method's own parameters, from the dimension D and the number of classes. With `branches`, each
    step has projections of its own, and the linear head is on those of all steps. With `booster`, from step 1 on the
    network in training also gives the logits of a booster. With `freeze_shared`, after step 0 only the head, the
    extension, the booster and the newest branch are trained.
    """

    head: Literal["linear", "proxies"] = "linear"
    num_proxies: int = 10
    pool: tuple[int, int] | None = None
    anchor: int | None = None
    extension: Callable[[int, int], Extension] | None = None
    branches: bool = False
    freeze_shared: bool = False
    booster: bool = False


DEFAULT_SPEC = NetworkSpec()
