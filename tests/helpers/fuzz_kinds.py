"""Kinds of inputs for the fuzz run: how each is made, damaged, and read."""

import io
import json
import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
import yaml
from hypothesis import strategies as st

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.encoders import VideoMAEConfig
from avcil_dist.config.loader import load_settings
from avcil_dist.config.schema import ClipConfig
from avcil_dist.config.serialization import config_from_yaml, flatten
from avcil_dist.data.layout import FeatureLayout
from avcil_dist.data.manifest import check_shards, load_manifest
from avcil_dist.data.npy import parse_npy
from avcil_dist.inference import restore_step
from avcil_dist.models.encoders.build import build_visual_encoder
from avcil_dist.models.network import load_whole_state
from avcil_dist.reporting.report import load_streams
from avcil_dist.streams.artifact import load_artifact, recorded_changes
from avcil_dist.streams.commit import COMMITTED, encode_json, encode_state
from avcil_dist.streams.identity import new_identity, read_identity, write_identity
from avcil_dist.streams.snapshots import newest_snapshot
from avcil_dist.streams.stream import scenario_of
from avcil_dist.tracking.event_queue import EventQueue
from avcil_dist.training.incremental_step import make_step
from avcil_dist.training.snapshot import SnapshotManager
from avcil_dist.world import World
from data_shards.build import BuildSettings, plan_build
from data_shards.build_plan import JobResult, Plan
from data_shards.importers.webdataset_tars import import_tars
from data_shards.listings.listing import read_class_names
from data_shards.listings.mixed_tars import SampleRules, read_mixed_tars
from data_shards.listings.published_lists import PUBLISHED_FILES, read_published_lists
from data_shards.listings.read import read_listing
from data_shards.random_features import make_feature_shards
from data_shards.rejections import Rejection, read_rejections, write_rejections
from data_shards.verify import shard_table, verify_shards
from launch.cluster.chain_record import Chain, read_chain, write_chain
from launch.cluster.resources import ClusterConfig
from tests.helpers.hostile_tars import HOSTILE, tar_of
from tests.helpers.mutations import CHANGES, EDITS, changed, damaged, to_json
from tests.helpers.published_forms import make_benchmark
from tests.unit.test_inference import commit_first_step

CPU = torch.device("cpu")


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
    document = {
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
    cluster = {
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
    """Manifests with changed values and the hash of them, and with damaged bytes."""

    values = st.one_of(st.tuples(st.just("bytes"), EDITS), st.tuples(st.just("values"), CHANGES))

    def prepare(self, folder: Path) -> None:
        self.url = make_feature_shards(folder / "data", classes=2, clips={"train": 4, "test": 1}, clips_per_shard=3)
        self.data = Path(self.url).read_bytes()

    def run(self, folder: Path, value: Any) -> None:
        mode, changes = value
        path = Path(self.url).with_name("changed.json")
        if mode == "bytes":
            path.write_bytes(damaged(self.data, changes))
        else:
            document = changed(json.loads(self.data), changes)
            if isinstance(document, dict):
                document.pop("content_hash", None)
                content = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
                document["content_hash"] = storage.sha256(content)
            path.write_bytes(to_json(document))
        manifest = load_manifest(str(path))
        shard_table(manifest)
        verify_shards(str(path))
        check_shards(manifest, range(len(manifest.shards)))
        FeatureLayout(manifest, pin=False).allocate(np.arange(manifest.first_clips[-1]))


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


@dataclass
class Folder:
    """Content of a committed folder, so that each input begins with the same files."""

    path: Path
    files: dict[str, bytes]
    commit: dict[str, Any]

    @classmethod
    def of(cls, path: Path) -> "Folder":
        files = {entry.name: entry.read_bytes() for entry in path.iterdir() if entry.name != COMMITTED}
        return cls(path, files, json.loads((path / COMMITTED).read_bytes()))

    def write(self, name: str, value: Any) -> None:
        """Change one file, and the commit so that it fits; or the commit itself."""
        mode, changes = value
        if name == COMMITTED:
            data = (
                to_json(changed(self.commit, changes)) if mode == "values" else damaged(to_json(self.commit), changes)
            )
            (self.path / COMMITTED).write_bytes(data)
            return
        if mode == "values" and name.endswith(".json"):
            data = to_json(changed(json.loads(self.files[name]), changes))
        elif mode == "values":
            data = self.files[name]
        else:
            data = damaged(self.files[name], changes)
        (self.path / name).write_bytes(data)
        digests = self.commit["files"] | {name: {"size": len(data), "sha256": storage.sha256(data)}}
        (self.path / COMMITTED).write_bytes(to_json(self.commit | {"files": digests}))

    def restore(self, name: str) -> None:
        if name != COMMITTED:
            (self.path / name).write_bytes(self.files[name])


MODES = st.one_of(st.tuples(st.just("bytes"), EDITS), st.tuples(st.just("values"), CHANGES))


class Artifacts(Kind):
    """Step artifacts whose files fit their commit, and commits."""

    names = (
        "model.safetensors",
        "method.json",
        "memory.json",
        "scenario.json",
        "metrics.json",
        "config.yaml",
        COMMITTED,
    )
    values = st.tuples(st.sampled_from(names), MODES)

    def prepare(self, folder: Path) -> None:
        self.stream, _ = commit_first_step(folder / "made")
        self.content = Folder.of(Path(self.stream, "step_000"))

    def run(self, folder: Path, value: Any) -> None:
        name, change = value
        self.content.write(name, change)
        try:
            artifact = load_artifact(self.stream, 0)
            recorded_changes(self.stream, 0)
            load_streams([self.stream])
            restore_step(artifact, {"frames": 2, "positions": 3, "dim": 16}, self.stream)
        finally:
            self.content.restore(name)


class Snapshots(Kind):
    """Snapshots whose files fit their commit, and commits."""

    names = (
        "model.safetensors",
        "training.json",
        "optimizer.safetensors",
        "optimizer.json",
        "best.safetensors",
        COMMITTED,
    )
    values = st.tuples(st.sampled_from(names), MODES)

    def prepare(self, folder: Path) -> None:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        stream, artifact = commit_first_step(folder / "made")
        self.config = artifact.config
        manifest = load_manifest(self.config.data.manifest)
        scenario = scenario_of(self.config, manifest)
        self.step = make_step(self.config, manifest, scenario, 0, None, world=World(), device=CPU)
        shutil.rmtree(stream)
        self.network, _ = restore_step(artifact, manifest.shape, stream)
        self.manager = SnapshotManager(self.step)
        totals = {"losses": {"loss": 1.5}, "reading": {}, "num_bad": 0, "faults": [], "seconds": 1.0}
        best = {"epoch": 0, "val_accuracy": 0.5, "num_ties": 0}
        training = {"iteration": 3, "best": best, "totals": totals, "counters": []}
        model = safetensors.torch.save(artifact.model)
        files = {"model.safetensors": model, "best.safetensors": model, "training.json": encode_json(training)}
        files |= encode_state("optimizer", {"0.exp_avg": torch.zeros(3), "0.step": torch.zeros(()), "0.x": 1.5})
        path = Path(self.manager.folder, "000000003")
        path.mkdir(parents=True)
        for name, data in files.items():
            (path / name).write_bytes(data)
        digests = {name: {"size": len(data), "sha256": storage.sha256(data)} for name, data in files.items()}
        identity = {"manifest_hash": manifest.content_hash, "previous_step": None}
        commit = {"format": 1, "files": digests, "settings": flatten(self.config), "world_size": 1, "zero_stage": 0}
        (path / COMMITTED).write_bytes(to_json(commit | identity))
        self.content = Folder.of(path)
        assert self.manager.load_newest() is not None

    def run(self, folder: Path, value: Any) -> None:
        name, change = value
        self.content.write(name, change)
        try:
            newest_snapshot(self.config, 0)
            snapshot = self.manager.load_newest()
            if snapshot:
                load_whole_state(self.network, snapshot.model, "snapshot")
        finally:
            self.content.restore(name)


class Records(Kind):
    """Small files of streams, builds and chains: identity, jobs, events, plans, results, rejected clips."""

    values = st.tuples(st.integers(0, 6), MODES)

    def prepare(self, folder: Path) -> None:
        write_identity(str(folder), new_identity())
        write_chain(str(folder), Chain("slurm", "n", str(folder), 3, jobs={0: ("1",)}))
        queue = EventQueue(folder)
        queue.append("begin", step=0)
        queue.save_cursor("u", queue.cursor("u"))
        plan = Plan("clip", ("dog",), {}, "d", (), (Rejection("p", "dog", "train", "crash", "r"),))
        storage.write_json(f"{folder}/plan.json", plan.to_dict())
        storage.write_json(f"{folder}/result.json", JobResult("d", None, plan.rejected).to_dict())
        write_rejections(f"{folder}/rejected.csv", plan.rejected)
        cursor = next(path.name for path in folder.iterdir() if path.name.startswith("cursor-"))
        names = ("stream.json", "jobs.json", "events.jsonl", cursor, "plan.json", "result.json", "rejected.csv")
        self.files = [(folder / name, (folder / name).read_bytes()) for name in names]
        self.queue = queue

    def run(self, folder: Path, value: Any) -> None:
        number, (mode, changes) = value
        path, data = self.files[number]
        is_json = mode == "values" and path.suffix in (".json", ".jsonl")
        newline = b"\n" if path.suffix == ".jsonl" else b""
        if mode == "bytes":
            path.write_bytes(damaged(data, changes) + newline)
        else:
            path.write_bytes(to_json(changed(json.loads(data), changes)) + newline if is_json else data)
        try:
            read = (
                lambda: read_identity(str(folder)),
                lambda: read_chain(str(folder)),
                lambda: self.queue.events("begin"),
                lambda: self.queue.is_sent("u"),
                lambda: Plan.read(str(path)),
                lambda: JobResult.read(str(path)),
                lambda: read_rejections(str(path)),
            )[number]
            read()
        finally:
            path.write_bytes(data)


class Weights(Kind):
    """Weights of encoders: safetensors, pickles of torch, and the description beside them."""

    values = st.tuples(st.integers(0, 2), EDITS)
    tiny = {"dim": 24, "depth": 1, "heads": 2}

    def prepare(self, folder: Path) -> None:
        clip = ClipConfig(frames=4, size=32, mel_frames=64, mel_bins=32)
        config = VideoMAEConfig.model_validate({"kind": "videomae", "weights": "random", **self.tiny})
        state = build_visual_encoder(config, clip, None, None).body.state_dict()
        torch.save(state, folder / "w.pth")
        safetensors.torch.save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text('{"num_attention_heads": 2}')
        self.paths = [folder / "w.pth", folder / "model.safetensors", folder / "config.json"]
        self.contents = [path.read_bytes() for path in self.paths]
        self.clip = clip

    def run(self, folder: Path, value: Any) -> None:
        number, edits = value
        path = self.paths[number]
        path.write_bytes(damaged(self.contents[number], edits))
        where = folder if number else path
        try:
            config = VideoMAEConfig.model_validate({"kind": "videomae", "weights": str(where), **self.tiny})
            build_visual_encoder(config, self.clip, None, None)
        finally:
            path.write_bytes(self.contents[number])


KINDS: dict[str, type[Kind]] = {
    "csv": Csv,
    "yaml": Yaml,
    "manifests": Manifests,
    "tars": Tars,
    "npy": Npy,
    "lists": Lists,
    "records": Records,
    "artifacts": Artifacts,
    "snapshots": Snapshots,
    "weights": Weights,
}
