"""Kind of network that a method needs. The encoders come from the configuration."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NetworkSpec:
    """The part of a network after its encoders.

    With `pool`, a grid of (frames, positions), that is only a mean over each cell of the grid of visual tokens: no
    attention, no projection, no head. Otherwise it is attention, projections and a head: `linear`, or `proxies`
    with `num_proxies` per class.
    """

    head: Literal["linear", "proxies"] = "linear"
    num_proxies: int = 10
    pool: tuple[int, int] | None = None


DEFAULT_SPEC = NetworkSpec()
