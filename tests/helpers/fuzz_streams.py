"""Kinds of inputs for the fuzz run that outlive a process: artifacts, snapshots, records, weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import safetensors.torch
import torch
import torch.distributed as dist
from hypothesis import strategies as st

from avcil_dist import storage
from avcil_dist.config.encoders import VideoMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.config.serialization import flatten
from avcil_dist.data.manifest import load_manifest
from avcil_dist.inference.predict import restore_step
from avcil_dist.models.encoders.build import build_visual_encoder
from avcil_dist.reporting.report import load_streams
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.commit import COMMITTED, encode_json
from avcil_dist.streams.identity import new_identity, read_identity, write_identity
from avcil_dist.streams.snapshots import newest_snapshot
from avcil_dist.streams.stream import scenario_of
from avcil_dist.streams.summary import recorded_changes
from avcil_dist.streams.tensor_parts import cut, part_key
from avcil_dist.streams.tensors import encode_tensors, read_committed_tensors
from avcil_dist.tracking.event_queue import EventQueue
from avcil_dist.training.deepspeed_private import Place
from avcil_dist.training.incremental_step import make_step
from avcil_dist.training.optimizer_parts import load_optimizer_parts
from avcil_dist.training.snapshot import Snapshot, SnapshotManager
from avcil_dist.world import World
from data_shards.build_plan import JobResult, Plan
from data_shards.rejections import Rejection, read_rejections, write_rejections
from launch.cluster.chain_record import Chain, read_chain, write_chain
from tests.helpers.fuzz_kinds import Kind
from tests.helpers.mutations import CHANGES, EDITS, changed, damaged, to_json
from tests.unit.test_inference import commit_first_step

CPU = torch.device("cpu")


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
        "model_000.safetensors",
        "training.json",
        "optimizer_000.safetensors",
        "best_000.safetensors",
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
        model = encode_tensors(cut(artifact.model, 0, 1))
        trained = dict(self.network.named_parameters())
        self.places = {name: Place(value, 0, 0, value.numel()) for name, value in trained.items()}
        moments = {
            f"{kind}/{name}": torch.ones_like(value)
            for kind in ("exp_avg", "exp_avg_sq")
            for name, value in trained.items()
        }
        state = cut(moments, 0, 1) | {part_key(f"step/{name}", 0): torch.ones(1) for name in trained}
        files = {"model_000.safetensors": model, "best_000.safetensors": model, "training.json": encode_json(training)}
        files |= {"optimizer_000.safetensors": encode_tensors(state)}
        path = Path(self.manager.folder, "000000003")
        path.mkdir(parents=True)
        for name, data in files.items():
            (path / name).write_bytes(data)
        digests = {name: {"size": len(data), "sha256": storage.sha256(data)} for name, data in files.items()}
        identity = {"manifest_hash": manifest.content_hash, "previous_step": None}
        commit = {"format": 1, "files": digests, "settings": flatten(self.config), "world_size": 1, "zero_stage": 0}
        (path / COMMITTED).write_bytes(to_json(commit | identity))
        self.content = Folder.of(path)
        assert self.load() is not None

    def run(self, folder: Path, value: Any) -> None:
        name, change = value
        self.content.write(name, change)
        try:
            newest_snapshot(self.config, 0)
            self.load()
        finally:
            self.content.restore(name)

    def load(self) -> Snapshot | None:
        """Load the newest snapshot, with the optimizer's state."""
        snapshot = self.manager.load_newest(self.network)
        if snapshot:
            optimizer = torch.optim.Adam(self.network.parameters())
            sizes = {name: place.length for name, place in self.places.items()}
            files = [read_committed_tensors(snapshot.folder, "optimizer_000.safetensors", snapshot.commit)]
            load_optimizer_parts(optimizer, self.places, sizes, files, snapshot.folder)
        return snapshot


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
    tiny: ClassVar[dict[str, int]] = {"dim": 24, "depth": 1, "heads": 2}

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
