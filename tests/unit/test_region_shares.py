"""Regions that make the sound: from a csv to the manifest, and shares on them over the steps of a stream."""

import json
from pathlib import Path

import numpy as np
import pytest

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import DataError
from avcil_dist.streams.region_shares import RegionShares
from data_shards.build import build_shards, central_region
from data_shards.listings.read import read_listing
from tests.helpers.rendered import render_tiny

NAN = float("nan")


def test_the_manifest_has_the_region_of_each_rendered_clip_and_no_field_without_them(tmp_path: Path) -> None:
    listing = render_tiny(tmp_path / "clips", train=1, val=1, test=2)
    regions = json.loads((tmp_path / "clips" / "regions.json").read_text())
    build_shards(listing, f"{tmp_path}/with", clips_per_shard=8, min_seconds=0.1)
    manifest = load_manifest(f"{tmp_path}/with/manifest.json")
    for clip in range(int(manifest.first_clips[-1])):
        assert manifest.region(clip) == tuple(regions[manifest.key(clip)])

    bare = listing.with_name("bare.csv")
    bare.write_text("\n".join(line.rpartition(",")[0] for line in listing.read_text().splitlines()))
    build_shards(bare, f"{tmp_path}/without", clips_per_shard=8, min_seconds=0.1)
    assert "regions" not in (tmp_path / "without" / "manifest.json").read_text()
    assert load_manifest(f"{tmp_path}/without/manifest.json").region(0) is None


@pytest.mark.parametrize(
    ("region", "message"),
    [("0 0 1", "is not four numbers"), ("0.5 0 0.5 1", "fractions of the picture"), ("0 0 nan 1", "fractions of")],
)
def test_a_region_that_is_none_is_an_error_of_its_line(tmp_path: Path, region: str, message: str) -> None:
    (tmp_path / "clips.csv").write_text(f"path,label,split,region\na.mp4,dog,train,{region}\n")
    with pytest.raises(DataError, match=f"line 2: region .*{message}"):
        read_listing(tmp_path / "clips.csv")


def test_a_region_is_a_part_of_the_central_square() -> None:
    assert central_region((0.0, 0.5, 0.5, 1.0), 64, 64) == (0.0, 0.5, 0.5, 1.0)
    assert central_region((0.0, 0.25, 1.0, 0.5), 100, 200) == (0.0, 0.0, 1.0, 0.5)  # the square is the middle half
    assert central_region((0.2, 0.0, 0.8, 0.5), 200, 100) == (0.0, 0.0, 1.0, 0.5)
    assert central_region((0.0, 0.0, 1.0, 0.2), 100, 200) is None


def test_shares_are_means_by_task_over_the_clips_that_have_evidence() -> None:
    clips = np.array([[0, 0.2, 0.5], [1, 0.4, NAN], [2, 0.3, NAN]])
    found = RegionShares.of_clips(clips, [slice(0, 2), slice(2, 3), slice(3, 4)], 0.25)
    assert found.attention == ((pytest.approx(0.3), 0.3, None),)
    assert found.evidence == ((0.5, None, None),)
    assert found.with_evidence == ((0.5, 0.0, None),)
    assert (found.num_clips, found.area) == (3, 0.25)


def test_shares_follow_those_of_earlier_steps_and_rows_of_nothing() -> None:
    first = RegionShares.of_clips(np.array([[0, 0.2, 0.5]]), [slice(0, 1)], 0.25)
    second = RegionShares.of_clips(np.array([[0, 0.4, NAN], [1, 0.2, 0.9]]), [slice(0, 1), slice(1, 2)], 0.25)
    both = second.following(first.following(None, 0), 1)
    assert both.evidence == ((0.5,), (None, 0.9))
    assert both.after("attention") == [0.2, pytest.approx(0.3)]
    assert both.after("evidence") == [0.5, 0.9]
    late = second.following(None, 1)  # the data set of step 0 had no regions
    assert late.attention == ((None,), (0.4, 0.2))
    assert late.after("attention")[0] is None
