"""Kinds of inputs for the fuzz run: how each is made, damaged, and read."""

import io
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import yaml
from hypothesis import strategies as st

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.loader import load_settings
from avcil_dist.config.serialization import config_from_yaml
from avcil_dist.data.layout import FeatureLayout
from avcil_dist.data.manifest import check_shards, load_manifest
from avcil_dist.data.npy import parse_npy
from data_shards.build import BuildSettings, plan_build
from data_shards.importers.webdataset_tars import import_tars
from data_shards.listings.listing import read_class_names
from data_shards.listings.mixed_tars import SampleRules, read_mixed_tars
from data_shards.listings.published_lists import PUBLISHED_FILES, read_published_lists
from data_shards.listings.read import read_listing
from data_shards.random_features import make_feature_shards
from data_shards.verify import shard_table, verify_shards
from launch.cluster.resources import ClusterConfig
from tests.helpers.hostile_tars import HOSTILE, tar_of
from tests.helpers.mutations import CHANGES, EDITS, changed, damaged, to_json
from tests.helpers.old_manifests import save_old
from tests.helpers.published_forms import make_benchmark


class Kind(ABC):
    """A kind of input. `values` is what hypothesis draws; `run` writes it as a file and reads that."""

    values: st.SearchStrategy[Any]

    @abstractmethod
    def prepare(self, folder: Path) -> None:
        """Make what all inputs share."""

    @abstractmethod
    def run(self, folder: Path, value: Any) -> None:
        """Read one input."""


class Csv(Kind):
    """Lists of clips in each form that is no folder, and lists of classes."""

    texts = (
        'path,label,split,source,start,duration\na.mp4,dog,train,v1,0,2\nb.mp4,"cat, grey",test,v2,1.5,\n',
        "path,label\na.mp4,dog\nsub/b.mp4,cat\n",
        'id1,30,dog,train\nid2,0,"cat, grey",test\n',
        "Category&VideoID&Quality&StartTime&EndTime\nBark&id1&good&0&10\nCat&id2&good&3&5\n",
    )
    values = st.tuples(st.integers(0, len(texts) - 1), EDITS)

    def prepare(self, folder: Path) -> None:
        (folder / "videos").mkdir()
        for name in ("a.mp4", "videos/id1.mp4", "videos/id2_000000.mp4"):
            (folder / name).write_bytes(b"")

    def run(self, folder: Path, value: Any) -> None:
        number, edits = value
        path = folder / "list.csv"
        path.write_bytes(damaged(self.texts[number].encode(), edits))
        if number == 1:
            read_class_names(path)
        listing = read_listing(path, folder / "videos" if number > 1 else None)
        plan_build(listing, BuildSettings(4, 0.5, keep_muted=True))


class Yaml(Kind):
    """Configurations, by bytes and by values, and cluster files."""

    values = st.one_of(
        st.tuples(st.just("bytes"), EDITS),
        st.tuples(st.just("values"), CHANGES),
        st.tuples(st.just("cluster"), CHANGES),
    )
    document: ClassVar[dict[str, Any]] = {
        "extends": "base",
        "name": "tiny",
        "output": "runs",
        "data": {"manifest": "m.json", "workers": 2, "clip": {"size": 32, "frames": 4}},
        "scenario": {"classes_per_step": [3, 2], "classes": ["a", "b", "c", "d", "e"]},
        "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
        "method": {"name": "avcil"},
        "optim": {"epochs": 3, "lr": 0.1},
        "engine": {"timeout_minutes": 5},
    }
    cluster: ClassVar[dict[str, Any]] = {
        "kind": "slurm",
        "nodes": 2,
        "partition": "p",
        "hours": 1.5,
        "setup": ["x"],
        "steps": {"1": {"nodes": 3}},
    }

    def prepare(self, folder: Path) -> None:
        pass

    def run(self, folder: Path, value: Any) -> None:
        mode, changes = value
        path = folder / "c.yaml"
        if mode == "cluster":
            path.write_bytes(to_json(changed(self.cluster, changes)))
            load_settings(path, ClusterConfig)
            return
        text = yaml.safe_dump(self.document).encode()
        path.write_bytes(damaged(text, changes) if mode == "bytes" else to_json(changed(self.document, changes)))
        config_from_yaml(path.read_bytes().decode(errors="replace")) if len(changes) == 1 else load_config(str(path))


class Manifests(Kind):
    """Manifests of both formats with changed values and the hash of them, and with damaged bytes."""

    values = st.one_of(
        st.tuples(st.sampled_from(["bytes", "table"]), EDITS), st.tuples(st.sampled_from(["values", "old"]), CHANGES)
    )

    def prepare(self, folder: Path) -> None:
        self.url = make_feature_shards(folder / "data", classes=2, clips={"train": 4, "test": 1}, clips_per_shard=3)
        self.data = Path(self.url).read_bytes()
        old = Path(self.url).with_name("old.json")
        save_old(load_manifest(self.url), str(old))
        self.old = old.read_bytes()
        self.table = next(old.parent.glob("clips-*.npz")).read_bytes()

    def run(self, folder: Path, value: Any) -> None:
        mode, changes = value
        path = Path(self.url).with_name("changed.json")
        if mode == "bytes":
            path.write_bytes(damaged(self.data, changes))
        elif mode == "table":
            table = damaged(self.table, changes)
            path.with_name("changed.npz").write_bytes(table)
            document = json.loads(self.data)
            document["clips"] |= {"url": "changed.npz", "bytes": len(table), "sha256": storage.sha256(table)}
            path.write_bytes(self._hashed(document, "hash"))
        elif mode == "old":
            path.write_bytes(self._hashed(changed(json.loads(self.old), changes), "content_hash"))
        else:
            path.write_bytes(self._hashed(changed(json.loads(self.data), changes), "hash"))
        manifest = load_manifest(str(path))
        shard_table(manifest)
        verify_shards(str(path))
        check_shards(manifest, range(len(manifest.shards)))
        FeatureLayout(manifest, pin=False).allocate(np.arange(manifest.first_clips[-1]))

    @staticmethod
    def _hashed(document: Any, name: str) -> bytes:
        if isinstance(document, dict):
            document.pop(name, None)
            content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
            document[name] = storage.sha256(content)
        return to_json(document)


class Tars(Kind):
    """Tars of others: for an index, and to be sorted."""

    values = st.tuples(st.integers(0, 1 << 20), EDITS)

    def prepare(self, folder: Path) -> None:
        good = tar_of(
            {
                name: data
                for n in range(3)
                for name, data in ((f"k{n}.mp4", bytes(700)), (f"k{n}.json", b'{"label": "dog"}'))
            }
        )
        numbered = tar_of({"./a/x.mp4": b"x", "./a/x.cls": b"3", "._y": b"", "b/y.webm": b"y", "b/y.txt": b"cat"})
        self.tars = [good, numbered, good, *HOSTILE.values()]

    def run(self, folder: Path, value: Any) -> None:
        number, edits = value
        path, manifest = folder / "a.tar", folder / "m.json"
        path.write_bytes(damaged(self.tars[number % len(self.tars)], edits))
        if number % 2:
            read_mixed_tars([str(path)], SampleRules(), None, saved=None, first=0)
            return
        manifest.unlink(missing_ok=True)
        import_tars([str(path)], str(manifest), split="train")
        load_manifest(str(manifest))


class Npy(Kind):
    """Members of a feature shard."""

    values = st.tuples(st.integers(0, 3), EDITS)

    def prepare(self, folder: Path) -> None:
        self.arrays = []
        for array in (np.zeros((6, 16), np.float16), np.zeros(16), np.asfortranarray(np.ones((2, 3))), np.array([{}])):
            buffer = io.BytesIO()
            np.save(buffer, array)
            self.arrays.append(buffer.getvalue())

    def run(self, folder: Path, value: Any) -> None:
        number, edits = value
        assert parse_npy(damaged(self.arrays[number], edits), "x.npy").dtype.kind in "biuf"


class Lists(Kind):
    """Published lists: pickled dicts."""

    values = st.tuples(st.integers(0, 2), EDITS)

    def prepare(self, folder: Path) -> None:
        self.lists = make_benchmark(folder / "lists", "VGGSound_100")
        self.contents = [(self.lists / name).read_bytes() for name in PUBLISHED_FILES]

    def run(self, folder: Path, value: Any) -> None:
        number, edits = value
        path = self.lists / PUBLISHED_FILES[number]
        path.write_bytes(damaged(self.contents[number], edits))
        try:
            read_published_lists(self.lists)
        finally:
            path.write_bytes(self.contents[number])
