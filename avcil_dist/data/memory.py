"""The memory: exemplars of old classes, as keys. The clips themselves stay in the shards.

Pure: selection is a function of keys and seed, independent of ranks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from avcil_dist.seeds import generator


@dataclass(frozen=True)
class Memory:
    """Class name to the keys of its exemplars, in order of importance."""

    keys: Mapping[str, tuple[str, ...]]

    @property
    def count(self) -> int:
        """Exemplars in all."""
        return sum(len(keys) for keys in self.keys.values())

    def to_record(self) -> dict[str, list[str]]:
        """The memory as plain JSON values, classes in the order they were learnt."""
        return {name: list(keys) for name, keys in self.keys.items()}

    @classmethod
    def from_record(cls, record: Mapping[str, Sequence[str]]) -> "Memory":
        """The inverse of `to_record`."""
        return cls({name: tuple(keys) for name, keys in record.items()})

    def update(self, candidates: Mapping[str, Sequence[str]], size: int, seed: int) -> "Memory":
        """The memory after a step that brought the classes of `candidates` (name to all their keys).

        Every class gets `size // classes`; old classes keep their first ones, new classes a random
        choice; a class with fewer clips gives what it has.
        """
        quota = size // (len(self.keys) + len(candidates))
        kept = {name: keys[:quota] for name, keys in self.keys.items()}
        return Memory(kept | {name: _choose(name, keys, quota, seed) for name, keys in candidates.items()})


EMPTY_MEMORY = Memory({})


def _choose(name: str, keys: Sequence[str], quota: int, seed: int) -> tuple[str, ...]:
    order = generator(seed, "memory", name).permutation(len(keys))
    return tuple(keys[i] for i in order[:quota])
