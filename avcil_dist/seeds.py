"""Seeds by name: every random choice has a seed of its own, made from what the choice is for.

So two choices never share a stream of random numbers, and a choice made late (epoch 70) needs
nothing of the choices before it.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit seed: the hash of (seed, purpose, parts)."""
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """A numpy generator seeded with `derive_seed` of the same arguments."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *parts)))
