import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist.data.manifest import Manifest
from avcil_dist.data.plan import (
    PADDING,
    EpochPlan,
    _by_shard,
    check_batch_fits,
    plan_epoch,
    plan_evaluation,
    plan_replay,
    rank_share,
    replay_passes,
    rows_at_a_time,
)
from avcil_dist.data.shard import Shard
from avcil_dist.errors import ConfigError

PROJECT = Path(__file__).parents[2]
TEN_BY_THREE = [[40, 40, 40]] * 10

# per class the clips of each of its shards
data_sets = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=6)
# (global batch, canonical nodes), the one a multiple of the other
batch_shapes = st.tuples(st.integers(1, 4), st.sampled_from([1, 2, 3])).map(lambda pair: (pair[0] * pair[1], pair[1]))
seeds = st.integers(0, 1000)
few = settings(max_examples=60, deadline=None)


def make_manifest(data_set: Sequence[Sequence[int]]) -> Manifest:
    """A manifest of training shards with the given clip counts, one test shard between the classes."""
    shards = []
    for number, counts in enumerate(data_set):
        for part, count in enumerate([*counts, 2]):
            split = "train" if part < len(counts) else "test"
            keys = tuple(f"k{number}_{part}_{row}" for row in range(count))
            shards.append(Shard.of(f"{number}-{part}.tar", f"c{number}", split, 0, "", keys, {}, {}))
    return Manifest("clip", tuple(f"c{number}" for number in range(len(data_set))), tuple(shards), {})


def plan(manifest: Manifest, classes: Sequence[str] | None = None, **changes: int) -> EpochPlan:
    arguments = {"seed": 0, "step": 0, "epoch": 0, "global_batch": 4, "canonical_nodes": 1, "window": 2} | changes
    return plan_epoch(manifest, manifest.classes if classes is None else classes, **arguments)


def ranges_of(epoch: EpochPlan, num_clips: int, canonical_nodes: int) -> list[np.ndarray]:
    """Each canonical node's clips in the order in which they are read."""
    share = epoch.batches.shape[1] // canonical_nodes
    used = len(epoch.batches) * share
    lengths = [len(part) for part in np.array_split(np.arange(num_clips), canonical_nodes)]
    cuts = np.cumsum([length - used for length in lengths])[:-1]
    rests = np.split(epoch.rest, cuts)
    return [
        np.concatenate([epoch.batches[:, number * share : (number + 1) * share].ravel(), rest])
        for number, rest in enumerate(rests)
    ]


@few
@given(data_sets, batch_shapes, st.integers(1, 5), seeds)
def test_every_clip_comes_exactly_once(
    data_set: list[list[int]], shape: tuple[int, int], window: int, seed: int
) -> None:
    manifest = make_manifest(data_set)
    epoch = plan(manifest, global_batch=shape[0], canonical_nodes=shape[1], window=window, seed=seed)
    planned = np.concatenate([epoch.batches.ravel(), epoch.rest])
    assert sorted(planned.tolist()) == manifest.clips(manifest.classes, "train").tolist()


@few
@given(data_sets, batch_shapes)
def test_the_rest_is_smaller_than_a_batch(data_set: list[list[int]], shape: tuple[int, int]) -> None:
    manifest = make_manifest(data_set)
    epoch = plan(manifest, global_batch=shape[0], canonical_nodes=shape[1])
    num_clips = len(manifest.clips(manifest.classes, "train"))
    assert epoch.batches.shape == (num_clips // shape[0], shape[0])
    assert len(epoch.rest) == num_clips % shape[0]


@few
@given(data_sets, st.data())
def test_only_training_clips_of_the_steps_classes_are_planned(data_set: list[list[int]], data: st.DataObject) -> None:
    manifest = make_manifest(data_set)
    classes = data.draw(st.lists(st.sampled_from(manifest.classes), unique=True))
    epoch = plan(manifest, classes, global_batch=1)
    assert sorted(epoch.batches.ravel().tolist()) == manifest.clips(classes, "train").tolist()
    assert epoch.batches.size == manifest.num_clips(classes, "train")


@few
@given(data_sets, st.sampled_from([(12, 1), (12, 2), (12, 3), (8, 4)]))
def test_ranks_have_equal_shares_that_make_up_the_global_batches(
    data_set: list[list[int]], shape: tuple[int, int]
) -> None:
    epoch = plan(make_manifest(data_set), global_batch=shape[0], canonical_nodes=shape[1])
    for world_size in (size for size in range(1, shape[0] + 1) if shape[0] % size == 0):
        shares = [rank_share(epoch.batches, rank, world_size) for rank in range(world_size)]
        assert {share.shape for share in shares} == {(len(epoch.batches), shape[0] // world_size)}
        np.testing.assert_array_equal(np.concatenate(shares, axis=1), epoch.batches)


@few
@given(data_sets, batch_shapes, seeds)
def test_the_plan_is_equal_across_calls_and_resumes_as_its_own_suffix(
    data_set: list[list[int]], shape: tuple[int, int], seed: int
) -> None:
    manifest = make_manifest(data_set)
    first = plan(manifest, global_batch=shape[0], canonical_nodes=shape[1], seed=seed, epoch=3)
    again = plan(make_manifest(data_set), global_batch=shape[0], canonical_nodes=shape[1], seed=seed, epoch=3)
    for start in range(len(first.batches) + 1):
        np.testing.assert_array_equal(again.batches[start:], first.batches[start:])
    np.testing.assert_array_equal(again.rest, first.rest)


@pytest.mark.slow
def test_the_plan_is_equal_across_processes() -> None:
    script = (
        "from tests.unit.test_plan import TEN_BY_THREE, make_manifest, plan; import json;"
        "print(json.dumps(plan(make_manifest(TEN_BY_THREE), seed=5, canonical_nodes=2).batches.tolist()))"
    )
    plans = [
        subprocess.run(
            [sys.executable, "-c", script],
            cwd=PROJECT,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert plans[0] == plans[1]
    assert json.loads(plans[0]) == plan(make_manifest(TEN_BY_THREE), seed=5, canonical_nodes=2).batches.tolist()


def test_the_plan_of_a_seed_stays_the_same_in_every_version() -> None:
    # Numbers of an earlier version: a stream that is continued must read what it would have read then.
    manifest = make_manifest([[5, 4], [6], [3, 2]])
    epoch = plan(manifest, seed=3, step=1, epoch=2, global_batch=4, canonical_nodes=2, window=2)
    assert epoch.batches.tolist() == [
        [19, 21, 4, 1], [0, 20, 22, 2], [11, 12, 5, 3], [15, 14, 8, 6], [13, 16, 23, 7]
    ]  # fmt: skip
    assert epoch.rest.tolist() == []
    assert replay(5, 2, 3, 4, seed=3, step=2).tolist() == [[47, 17, 17, 37], [27, 47, 7, 7], [47, 37, 27, 17]]


def test_the_order_differs_by_epoch_step_and_seed() -> None:
    manifest = make_manifest(TEN_BY_THREE)
    changes: list[dict[str, int]] = [{}, {"epoch": 1}, {"epoch": 2}, {"step": 1}, {"seed": 1}]
    orders = [plan(manifest, **change).batches for change in changes]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.1


@few
@given(data_sets, batch_shapes, st.integers(1, 5), seeds)
def test_a_canonical_node_reads_the_same_clips_in_every_epoch(
    data_set: list[list[int]], shape: tuple[int, int], window: int, seed: int
) -> None:
    manifest = make_manifest(data_set)
    num_clips = len(manifest.clips(manifest.classes, "train"))
    epochs = [
        plan(manifest, global_batch=shape[0], canonical_nodes=shape[1], window=window, seed=seed, epoch=epoch)
        for epoch in (0, 1, 7)
    ]
    first, *others = [[set(clips.tolist()) for clips in ranges_of(epoch, num_clips, shape[1])] for epoch in epochs]
    assert all(other == first for other in others)


def test_a_canonical_node_reads_other_clips_in_another_step() -> None:
    manifest = make_manifest(TEN_BY_THREE)
    first, second = [
        set(ranges_of(plan(manifest, canonical_nodes=2, step=step), 1200, 2)[0].tolist()) for step in (0, 1)
    ]
    assert 0.3 < len(first & second) / len(first) < 0.7  # half of the shards by chance


def open_shards(manifest: Manifest, clips: np.ndarray) -> list[set[int]]:
    """At each place of a stream, the shards with clips both before and from there on."""
    shards = [manifest.locate(int(clip))[0] for clip in clips]
    last = {shard: place for place, shard in enumerate(shards)}
    first = {shard: place for place, shard in reversed(list(enumerate(shards)))}
    return [{shard for shard in last if first[shard] < place <= last[shard]} for place in range(len(shards))]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(1, 12), st.integers(1, 8), st.sampled_from([1, 2, 3]), seeds)
def test_no_more_shards_than_the_window_and_two_are_open_at_a_time(
    num_shards: int, count: int, window: int, canonical_nodes: int, seed: int
) -> None:
    manifest = make_manifest([[count]] * num_shards)
    epoch = plan(manifest, canonical_nodes=canonical_nodes, global_batch=canonical_nodes, window=window, seed=seed)
    for clips in ranges_of(epoch, num_shards * count, canonical_nodes):
        assert max(map(len, open_shards(manifest, clips)), default=0) <= window + 2


@settings(max_examples=25, deadline=None)
@given(data_sets, st.integers(1, 5), seeds)
def test_open_clips_are_bounded_where_shards_differ_in_size(data_set: list[list[int]], window: int, seed: int) -> None:
    manifest = make_manifest(data_set)
    clips = plan(manifest, global_batch=1, window=window, seed=seed).batches.ravel()
    counts = [count for of_class in data_set for count in of_class]
    bound = window * sum(counts) / len(counts) + 2 * max(counts)
    for shards in open_shards(manifest, clips):
        assert sum(manifest.shards[shard].count for shard in shards) <= bound


@pytest.mark.parametrize("canonical_nodes", [1, 2])
def test_batches_hold_the_classes_about_in_proportion(canonical_nodes: int) -> None:
    manifest = make_manifest(TEN_BY_THREE)
    deviations = []
    for epoch, seed in itertools.product(range(5), range(4)):
        batches = plan(manifest, global_batch=32, window=16, canonical_nodes=canonical_nodes, epoch=epoch, seed=seed)
        for batch in batches.batches:
            counts = Counter(manifest.class_of(clip) for clip in batch)
            assert len(counts) >= 5
            assert max(counts.values()) <= 14
            deviations.append(sum((counts[name] - 3.2) ** 2 for name in manifest.classes) / 10)
    # a draw from all 1200 clips has 32 * 0.1 * 0.9 = 2.9; shards in a random order have 6.6, in listed order 15
    assert np.mean(deviations) < 4.0


def test_a_narrow_window_does_not_give_batches_of_one_class() -> None:
    manifest = make_manifest(TEN_BY_THREE)
    for seed in range(10):
        for batch in plan(manifest, global_batch=32, window=4, seed=seed).batches:
            counts = Counter(manifest.class_of(clip) for clip in batch)
            assert len(counts) >= 3
            assert max(counts.values()) <= 24


def test_a_batch_that_is_no_multiple_of_the_canonical_nodes_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch 4 is not a multiple of 3 canonical nodes"):
        plan(make_manifest([[10]]), global_batch=4, canonical_nodes=3)


def test_joined_exemplars_occur_once_per_epoch_among_the_current_clips() -> None:
    manifest = make_manifest([[6, 6], [6, 6], [6, 6]])
    current = manifest.clips(["c2"], "train")
    exemplars = np.concatenate([manifest.clips(["c1"], "train")[[11, 0, 7]], manifest.clips(["c0"], "train")[[5, 6]]])
    for epoch in range(3):
        planned = plan_epoch(
            manifest,
            ["c2"],
            seed=0,
            step=1,
            epoch=epoch,
            global_batch=4,
            canonical_nodes=1,
            window=2,
            exemplars=exemplars,
        )
        clips = [*planned.batches.ravel().tolist(), *planned.rest.tolist()]
        assert sorted(clips) == sorted([*current.tolist(), *exemplars.tolist()])


def test_exemplars_are_divided_where_a_shard_begins() -> None:
    manifest = make_manifest([[3, 3], [4]])  # a test shard of two clips follows each class
    assert [part.tolist() for part in _by_shard(manifest, np.array([8, 3, 2, 5]))] == [[2], [3, 5], [8]]


def test_classes_of_unequal_size_are_spread_over_the_whole_epoch() -> None:
    manifest = make_manifest([[10] * 20, [10] * 4])
    small = set(manifest.clips(["c1"], "train").tolist())
    for seed in range(10):
        first_half = plan(manifest, global_batch=24, window=1, seed=seed).batches[:5].ravel()
        assert 10 <= len(small & set(first_half.tolist())) <= 30  # of 40


@pytest.mark.parametrize(
    ("current", "replayed", "most", "rows"),
    [
        (8, 4, None, 12),
        (8, 4, 12, 12),
        (8, 4, 11, 6),
        (8, 4, 6, 6),
        (8, 4, 5, 3),
        (8, 4, 3, 3),
        (7, 0, None, 7),
        (6, 0, 4, 3),
    ],
)
def test_a_micro_batch_is_an_equal_part_of_current_clips_and_exemplars(
    current: int, replayed: int, most: int | None, rows: int
) -> None:
    assert rows_at_a_time(current, replayed, most) == rows


def test_a_micro_batch_smaller_than_every_part_is_refused_with_the_parts() -> None:
    with pytest.raises(ConfigError, match=r"^engine\.micro_batch=2: .* 8 current .* 4 exemplars .* 3, 6, 12 clips"):
        rows_at_a_time(8, 4, 2)


def test_no_class_gives_an_empty_plan() -> None:
    epoch = plan(make_manifest([[3], [4]]), [])
    assert epoch.batches.shape == (0, 4)
    assert epoch.rest.shape == (0,)


def replay(size: int, first: int, count: int, batch: int, **changes: int) -> np.ndarray:
    exemplars = np.arange(size) * 10 + 7
    return plan_replay(exemplars, **({"seed": 0, "step": 1} | changes), first=first, count=count, global_batch=batch)


@few
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 30))
def test_each_pass_of_replay_holds_each_exemplar_once(size: int, batch: int, count: int) -> None:
    batches = replay(size, 0, count, batch)
    assert batches.shape == (count, batch)
    stream = batches.ravel().tolist()
    for start in range(0, len(stream) - size + 1, size):
        assert sorted(stream[start : start + size]) == [number * 10 + 7 for number in range(size)]
    remainder = stream[len(stream) - len(stream) % size :]
    assert len(set(remainder)) == len(remainder)


@few
@given(st.integers(1, 20), st.integers(1, 12), st.integers(0, 20), st.integers(0, 20))
def test_a_part_of_the_replay_is_the_same_part_of_the_whole(size: int, batch: int, first: int, count: int) -> None:
    whole = replay(size, 0, first + count, batch)
    np.testing.assert_array_equal(replay(size, first, count, batch), whole[first:])


def test_the_passes_of_a_replay_are_counted_over_the_whole_step() -> None:
    passes = replay_passes(5, first=2, count=3, global_batch=4)
    assert passes.tolist() == [[1, 1, 2, 2], [2, 2, 2, 3], [3, 3, 3, 3]]
    batches = replay(5, 2, 3, 4)
    assert sorted(batches[passes == 2].tolist()) == [7, 17, 27, 37, 47]


def test_a_memory_smaller_than_a_batch_repeats_evenly() -> None:
    counts = Counter(replay(3, 0, 1, 8).ravel().tolist())
    assert sorted(counts.values()) == [2, 3, 3]


def test_replay_is_reshuffled_at_each_pass_and_differs_by_step_and_seed() -> None:
    passes = replay(50, 0, 3, 50)
    others = [*passes, *replay(50, 0, 1, 50, step=2), *replay(50, 0, 1, 50, seed=1)]
    for one, other in itertools.combinations(others, 2):
        assert (one == other).mean() < 0.2


@few
@given(st.integers(0, 40), st.integers(1, 9))
def test_evaluation_is_padded_only_at_the_end(num_clips: int, batch: int) -> None:
    clips = np.arange(num_clips) + 5
    batches = plan_evaluation(clips, batch)
    assert batches.shape == (-(-num_clips // batch), batch)
    stream = batches.ravel()
    np.testing.assert_array_equal(stream[:num_clips], clips)
    assert (stream[num_clips:] == PADDING).all()


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_any_number_of_ranks_evaluates_each_clip_once_in_order(world_size: int) -> None:
    clips = np.arange(500) + 5
    batches = plan_evaluation(clips, 256, world_size)
    shares = [rank_share(batches, rank, world_size) for rank in range(world_size)]
    assert {share.shape for share in shares} == {(2, -(-256 // world_size))}
    evaluated = np.stack(shares).transpose(1, 0, 2).ravel()  # as the ranks' predictions are put together
    np.testing.assert_array_equal(evaluated[:500], clips)
    assert (evaluated[500:] == PADDING).all()


def test_a_batch_is_never_shared_by_ranks_that_do_not_divide_it() -> None:
    with pytest.raises(ConfigError, match="global batch=256 cannot be shared by 3 processes; it fits 1, 2, 4, 8, "):
        rank_share(np.zeros((2, 256), dtype=np.int64), 0, 3)


def test_a_world_that_cannot_share_the_batch_is_refused_with_the_sizes_that_fit() -> None:
    for world_size in (1, 2, 3, 4, 6, 12):
        check_batch_fits("optim.global_batch", 12, world_size)
    with pytest.raises(ConfigError) as caught:
        check_batch_fits("optim.global_batch", 12, 5)
    assert str(caught.value) == (
        "optim.global_batch=12 cannot be shared by 5 processes; it fits 1, 2, 3, 4, 6, 12 processes, "
        "or choose a multiple of 5"
    )
