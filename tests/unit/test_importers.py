"""Importers of other packages: clips and features of a foreign layout become shards; only a name imports code."""

import sys
from pathlib import Path

import numpy as np
import pytest

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import ConfigError, DataError
from avcil_dist.system.plugins import plug_in_names
from data_shards.build import BuildSettings, build_listing
from data_shards.importers.plug_in import BUILT_IN, load_importer
from data_shards.listings.importer import ClipImporter
from data_shards.listings.read import read_listing
from data_shards.synthetic import SyntheticSpec, render_clip
from tests.helpers.plugins import fresh_plug_ins, install
from tests.helpers.streams import avcil

__all__ = ["fresh_plug_ins"]
CODE = '''
import numpy as np

from data_shards.importers.feature_importer import FeatureImporter, ForeignFeatures
from data_shards.listings.importer import ClipImporter
from data_shards.listings.listing import ClipFile, ListedClip, Listing, ListingRow, safe_key


class Lines(ClipImporter):
    """A text file with a line `split:class:file` for each clip."""

    def read(self, path, videos, shares):
        rows = []
        for line in path.read_text().split():
            split, label, name = line.split(":")
            clip = ListedClip((ClipFile(str(path.parent / name)),), safe_key(name[:-4]), name)
            rows.append(ListingRow(label, split, clip))
        return Listing.from_rows(rows)


class Arrays:
    def __init__(self, path):
        self.file = np.load(path)

    def __contains__(self, key):
        return key in self.file

    def read(self, key):
        return self.file[key]


class Zips(FeatureImporter):
    """`visual.npz` and `audio.npz`; keys are SPLIT-CLASS-NUMBER."""

    def files(self, path):
        return [path / "visual.npz", path / "audio.npz"]

    def open(self, path):
        visual, audio = map(Arrays, self.files(path))
        labels = {}
        for key in visual.file:
            split, label, _ = key.split("-")
            labels.setdefault(split, {})[key] = label
        return ForeignFeatures(("cat", "dog"), labels, visual, audio, frames=2)


NOT_AN_IMPORTER = 3
'''
POINTS = {"importers": {"lines": "foreign:Lines", "zips": "foreign:Zips", "none": "foreign:NOT_AN_IMPORTER"}}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, tmp_path, "foreign", POINTS, CODE)


@pytest.mark.usefixtures("foreign")
def test_clips_of_another_layout_are_built(tmp_path: Path) -> None:
    spec = SyntheticSpec(1, {"test": 1}, seconds=1.0, size=32, frames_per_second=8)
    (tmp_path / "a.mp4").write_bytes(render_clip(spec, "test", 0, 0))
    (tmp_path / "clips.txt").write_text("train:cat:a.mp4\ntest:dog:missing.mp4\n")
    with pytest.raises(DataError, match="its header is"):
        read_listing(tmp_path / "clips.txt")
    assert "foreign" not in sys.modules  # an installed package is imported by its name alone
    importer = load_importer("lines")
    assert isinstance(importer, ClipImporter)
    listing = read_listing(tmp_path / "clips.txt", form=importer)
    build_listing(listing, str(tmp_path / "shards"), BuildSettings(8, 0.5, True))
    manifest = load_manifest(f"{tmp_path}/shards/manifest.json")
    assert [manifest.key(int(clip)) for clip in manifest.clips(["cat"], "train")] == ["a"]
    assert "missing.mp4" in (tmp_path / "shards" / "rejected.csv").read_text()


@pytest.mark.usefixtures("foreign")
def test_features_of_another_layout_are_imported_and_kept(tmp_path: Path) -> None:
    source = tmp_path / "features"
    source.mkdir()
    random = np.random.default_rng(0)
    keys = [f"{split}-{label}-{number}" for split in ("train", "test") for label in ("cat", "dog") for number in (0, 1)]
    np.savez(source / "visual.npz", **{key: random.normal(size=(6, 4)).astype(np.float32) for key in keys})
    np.savez(source / "audio.npz", **{key: random.normal(size=4).astype(np.float32) for key in keys[1:]})
    words = ("shards", "build", source, tmp_path / "shards", "--importer", "foreign:Zips")
    result = avcil(*words)
    assert result.exit_code == 0, result.output
    manifest = load_manifest(f"{tmp_path}/shards/manifest.json")
    assert (manifest.kind, manifest.shape) == ("feature", {"frames": 2, "positions": 3, "dim": 4})
    assert [len(manifest.clips([name], "train")) for name in ("cat", "dog")] == [1, 2]
    assert "no audio features" in (tmp_path / "shards" / "rejected.csv").read_text()
    assert avcil(*words).exit_code == 0  # the same inputs leave it as it is
    again = avcil(*words, "--part", "1/2")
    assert again.exit_code == 2
    assert "--part: foreign:Zips reads features" in again.output


@pytest.mark.usefixtures("foreign")
def test_an_importer_is_a_class_of_its_kind_or_a_form_that_is_built_in() -> None:
    assert plug_in_names("importers", BUILT_IN) == ["lines", "none", "zips"]
    assert load_importer("clips_csv").NEEDS_VIDEOS is False  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"'none' is no class derived from .*ClipImporter or .*FeatureImporter"):
        load_importer("none")
    with pytest.raises(ConfigError, match=r"--importer: 'linse' is none of ave, clip_folder, .*lines"):
        load_importer("linse")
