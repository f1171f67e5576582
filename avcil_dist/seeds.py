"""Named seeds: every random choice has its own seed, a hash of its purpose.

Two choices never share a stream of random numbers, and a late choice (epoch 70) does not depend on earlier ones.
"""

import hashlib

import numpy as np


def derive_seed(seed: int, purpose: str, *parts: int | str) -> int:
    """Return a 63-bit seed: the hash of (seed, purpose, parts)."""
    text = "\x1f".join([str(seed), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """Return a numpy generator, seeded with `derive_seed` of the same arguments."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, purpose, *parts)))
