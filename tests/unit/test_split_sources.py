"""Splits within each class: whole sources, a clip of each class in each split, the same from any order."""

import os
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist.data.manifest import Manifest
from avcil_dist.errors import ConfigError
from data_shards.listings.read import read_listing
from data_shards.listings.splits import SplitShares, split_sources
from data_shards.listings.video_names import source_video
from data_shards.split_table import lacking_classes
from launch.cli.shards import shards
from tests.helpers.data import needs_published, published
from tests.helpers.rendered import tiny_clip

SPLITS = ("train", "val", "test")


def _clips(**sources: int) -> list[tuple[str, str]]:
    """Clips of one source each: so many in each class."""
    return [(label, f"{label}-{number}") for label, count in sources.items() for number in range(count)]


def _counts(clips: list[tuple[str, str]], shares: SplitShares | None = None) -> dict[str, tuple[int, ...]]:
    splits = split_sources(clips, shares or SplitShares())
    counts = Counter((label, splits[source]) for label, source in clips)
    return {label: tuple(counts[label, split] for split in SPLITS) for label, _ in clips}


def test_each_class_is_split_in_its_shares() -> None:
    assert _counts(_clips(dog=100, cat=40, owl=7, bat=3, ant=2, bee=1)) == {
        "dog": (80, 10, 10),
        "cat": (32, 4, 4),
        "owl": (5, 1, 1),
        "bat": (1, 1, 1),
        "ant": (1, 0, 1),
        "bee": (1, 0, 0),
    }
    assert _counts(_clips(dog=10), SplitShares(0.9, 0, 0.1)) == {"dog": (9, 0, 1)}
    assert _counts(_clips(dog=10), SplitShares(0, 0, 1)) == {"dog": (0, 0, 10)}


def test_clips_of_one_source_stay_together_also_across_classes() -> None:
    clips = [("dog", f"video-{number // 5}") for number in range(50)]
    clips += [("cat", f"video-{number}") for number in range(10)]
    counts = _counts(clips)
    assert counts == {"dog": (40, 5, 5), "cat": (8, 1, 1)}


def test_a_class_of_few_large_sources_still_has_all_splits() -> None:
    clips = [("dog", source) for source in ("a", "b", "c") for _ in range(30)]
    assert sorted(_counts(clips)["dog"]) == [30, 30, 30]
    clips = [("dog", source) for source, count in {"a": 90, "b": 2, "c": 30}.items() for _ in range(count)]
    assert 0 not in _counts(clips)["dog"]
    assert _counts(clips)["dog"][0] == 90


def test_splits_are_those_of_every_version_of_this_program() -> None:
    splits = split_sources(_clips(dog=12))
    assert {source: split for source, split in splits.items() if split != "train"} == {"dog-6": "test", "dog-10": "val"}


CLIPS = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from([f"v{i}" for i in range(12)])), max_size=60)


@given(CLIPS, st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_splits_depend_on_names_alone(clips: list[tuple[str, str]], random: object) -> None:
    shuffled = list(clips)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split_sources(shuffled) == split_sources(clips)


@given(st.dictionaries(st.sampled_from("abcdef"), st.lists(st.integers(1, 40), min_size=3, max_size=12), min_size=1))
@settings(max_examples=200, deadline=None)
def test_each_class_of_three_sources_has_a_clip_in_each_split(sizes: dict[str, list[int]]) -> None:
    sources = [(label, i, count) for label, counts in sizes.items() for i, count in enumerate(counts)]
    clips = [(label, f"{label}{i}") for label, i, count in sources for _ in range(count)]
    assert all(0 not in counts for counts in _counts(clips).values())


@pytest.mark.parametrize("text", ["0.8,0.2", "0.8,0.1,0.2", "a,b,c", "1.1,-0.1,0", "nan,0,1", "", "0.5,0.5,inf"])
def test_impossible_shares_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        SplitShares.parse(text)
    assert SplitShares.parse("0.7, 0.1, 0.2") == SplitShares(0.7, 0.1, 0.2)


@pytest.mark.parametrize(
    ("stem", "source"),
    [
        ("7q1E1pueAU4_12.09", "7q1E1pueAU4"),
        ("-_aE1pueAU4_000030", "-_aE1pueAU4"),
        ("ZcKsPFZG4_0_65.22", "ZcKsPFZG4_0"),
        ("7q1E1pueAU4_30000_40000", "7q1E1pueAU4"),
        ("7q1E1pueAU4_30_40", "7q1E1pueAU4"),
        ("short_000030_000040", "short"),
        ("v_Biking_g03_c11", "v_Biking_g03"),
        ("video_331", "video_331"),
        ("7q1E1pueAU4", "7q1E1pueAU4"),
        ("a_b", "a_b"),
    ],
)
def test_the_source_of_a_file_is_its_name_without_times(stem: str, source: str) -> None:
    assert source_video(stem) == source


def _splits_of(source: Path) -> dict[tuple[str, object], str]:
    rows = read_listing(source).rows
    return {(os.path.relpath(row.clip.path, source.parent), row.clip.cut): row.split for row in rows}


def test_a_csv_without_splits_is_split_by_source_or_file(tmp_path: Path) -> None:
    rows = [f"d/{person}/00001.mp4,dog,,{second},5" for person in range(10) for second in (0, 5)]
    rows += [f"x/{number}.mp4,cat,film-{number % 5},," for number in range(10)]
    (tmp_path / "clips.csv").write_text("\n".join(["path,label,source,start,duration", *rows]))
    listing = read_listing(tmp_path / "clips.csv")
    by_source: dict[str, set[str]] = {}
    for row in listing.rows:
        by_source.setdefault(row.clip.path if row.label == "dog" else row.clip.source, set()).add(row.split)
    assert all(len(splits) == 1 for splits in by_source.values())
    counts = Counter((row.label, row.split) for row in listing.rows)
    assert [counts["dog", split] for split in SPLITS] == [16, 2, 2]
    assert [counts["cat", split] for split in SPLITS] == [6, 2, 2]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "clips.csv").write_text("\n".join(["path,label,source,start,duration", *rows[::-1]]))
    assert _splits_of(moved / "clips.csv") == _splits_of(tmp_path / "clips.csv")


def test_shares_are_refused_where_a_listing_has_splits(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text("path,label,split\na.mp4,dog,train\n")
    (tmp_path / "videos/train/dog").mkdir(parents=True)
    (tmp_path / "videos/train/dog/a.mp4").write_bytes(b"")
    for source in (tmp_path / "clips.csv", tmp_path / "videos"):
        with pytest.raises(ConfigError, match="has its own splits; leave out --split"):
            read_listing(source, None, SplitShares())


@needs_published("real_clips")
def test_each_class_of_real_clips_has_validation_and_test_clips() -> None:
    rows = read_listing(published("real_clips") / "music").rows
    counts = Counter((row.label, row.split) for row in rows)
    for label in {row.label for row in rows}:
        assert all(counts[label, split] for split in SPLITS), label


@pytest.mark.slow
def test_the_command_prints_what_came_out(tmp_path: Path) -> None:
    for label, count in {"dog": 5, "cat": 2}.items():
        for number in range(count):
            path = tmp_path / "videos" / label / f"{number}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny_clip())
    words = ["build", f"{tmp_path}/videos", f"{tmp_path}/out", "--split", "0.6,0.2,0.2", "--processes", "1"]
    result = CliRunner().invoke(shards, words)
    assert result.exit_code == 0, result.output
    rows = [line.strip("│ ").split("│") for line in result.output.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["train", "4", "2", "1", "2", "3"],
        ["val", "1", "1", "1", "1", "1"],
        ["test", "2", "2", "1", "1", "1"],
    ]
    assert "1 of 2 classes have no validation clip: cat" in result.output


def test_a_split_that_no_class_has_is_one_line() -> None:
    assert lacking_classes(Manifest("clip", ("a", "b"), (), {}))[0] == "no class has a training clip"
