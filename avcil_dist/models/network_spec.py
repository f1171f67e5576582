"""What kind of network a method asks for; which encoders it has is the configuration's."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NetworkSpec:
    """What follows the encoders.

    With `pool` (frames, positions) that is nothing but a mean over each cell of such a grid of
    visual tokens: no attention, no projection, no head. Otherwise attention, projections and a
    head: `linear`, or `proxies` with `num_proxies` a class.
    """

    head: Literal["linear", "proxies"] = "linear"
    num_proxies: int = 10
    pool: tuple[int, int] | None = None


DEFAULT_SPEC = NetworkSpec()
