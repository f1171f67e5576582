"""Shuffle in a moving window, made in blocks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist.data import shuffle


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0.1, 250), st.integers(1, 90), st.integers(0, 1000))
def test_a_shuffle_in_blocks_is_that_of_one_sort(count: int, reach: float, block: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    if reach >= count:
        expected = random.permutation(count)
    else:
        shifted = np.abs((random.random(count) - 0.5) * reach + np.arange(0.5, count))
        expected = np.argsort(np.where(shifted > count, 2 * count - shifted, shifted), kind="stable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "BLOCK", block)
        blocks = list(shuffle.window_shuffle(count, reach, np.random.default_rng(seed)))
    assert len(blocks) >= count // max(block, reach / 8 + 1)
    np.testing.assert_array_equal(np.concatenate(blocks), expected)
