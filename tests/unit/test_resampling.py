"""Bootstrap over source videos, and paired tests."""

import math

import numpy as np
import pytest

from avcil_dist.streams.resampling import bootstrap_means, compare_paired, interval, mcnemar

RANDOM = np.random.default_rng(0)


def test_the_spread_of_means_is_the_standard_error() -> None:
    values = RANDOM.normal(size=400)
    means = bootstrap_means(values[:, None], [str(n) for n in range(400)], seed=0, draws=4000)[:, 0]
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / math.sqrt(400), rel=0.05)
    low, high = interval(means) or (0, 0)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(400), rel=0.08)


def test_clips_of_one_video_are_drawn_together() -> None:
    """Ten equal clips of a video carry the information of one: the error is that of the videos."""
    videos = RANDOM.normal(size=50)
    values, sources = np.repeat(videos, 10), [str(n // 10) for n in range(500)]
    alone = bootstrap_means(videos[:, None], [f"{n:02}" for n in range(50)], seed=3)
    together = bootstrap_means(values[:, None], [f"{int(name):02}" for name in sources], seed=3)
    np.testing.assert_allclose(together, alone)
    assert bootstrap_means(values[:, None], [str(n) for n in range(500)], seed=3).std() < 0.5 * together.std()


def test_a_draw_is_the_mean_of_the_clips_that_are_drawn() -> None:
    """A sample of one video of two is the mean of that video or of the other, or of both by their clips."""
    means = bootstrap_means(np.array([[0.0], [0.0], [1.0]]), ["a", "a", "b"], seed=0)[:, 0]
    assert set(np.round(means, 6)) == {0.0, 0.333333, 1.0}


def test_a_column_covers_its_own_clips_only() -> None:
    values = np.array([[1.0, np.nan], [0.0, np.nan], [1.0, 1.0], [0.0, 1.0]])
    means = bootstrap_means(values, list("abcd"), seed=0)
    known = means[:, 1][~np.isnan(means[:, 1])]
    assert set(known) == {1.0}
    assert len(known) < len(means)  # a draw without c and d has no mean
    assert interval(np.array([math.nan])) is None


def test_the_seed_alone_decides() -> None:
    values, sources = RANDOM.normal(size=(30, 2)), [str(n // 3) for n in range(30)]
    first = bootstrap_means(values, sources, seed=1, draws=10)
    np.testing.assert_array_equal(first, bootstrap_means(values, sources, seed=1, draws=10))
    assert not np.array_equal(first, bootstrap_means(values, sources, seed=2, draws=10))


def test_blocks_of_draws_give_the_same_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values, sources = RANDOM.normal(size=(30, 1)), [str(n) for n in range(30)]
    whole = bootstrap_means(values, sources, seed=1, draws=50)
    monkeypatch.setattr("avcil_dist.streams.resampling.BLOCK", 100)
    np.testing.assert_allclose(bootstrap_means(values, sources, seed=1, draws=50), whole)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 3), (10, 2), (0, 7), (25, 40)])
def test_mcnemar_is_the_sign_test_of_the_clips_that_differ(first: int, second: int) -> None:
    total = first + second
    tail = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail))


def test_a_paired_difference_has_the_counts_of_either_stream() -> None:
    first = np.array([True] * 70 + [False] * 30)
    second = np.array([True] * 50 + [False] * 20 + [True] * 5 + [False] * 25)
    found = compare_paired(first, second, [str(n) for n in range(100)], seed=0)
    assert (found.only_first, found.only_second) == (20, 5)
    assert found.difference == pytest.approx(0.15)
    assert found.low < 0.15 < found.high
    error = math.sqrt((25 / 100 - 0.15**2) / 100)
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.12)
    assert found.p_value == mcnemar(20, 5)
    reverse = compare_paired(second, first, [str(n) for n in range(100)], seed=0)
    assert (reverse.low, reverse.high) == pytest.approx((-found.high, -found.low))
