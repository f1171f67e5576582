"""Training on raw video with a clip that kills every process which decodes it."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from avcil_dist.data.manifest import Manifest, load_manifest
from data_shards.shard_writer import shard_url, write_shard
from tests.helpers.lethal import CRASH, DAMAGE, END, decoder_hook
from tests.helpers.rendered import tiny_clip
from tests.helpers.streams import weights_digest

PROJECT = Path(__file__).parents[2]
CLIP = {"frames": 2, "size": 32, "mel_bins": 16, "mel_frames": 32}
TAIL = "file.getvalue()[-30:] + b'\\n'"  # its key and END
LETHAL = ("train-dog-1", "val-dog-1", "test-dog-1")


def _shards(root: Path) -> str:
    """Two classes of rendered clips, of which those in LETHAL are marked for the hook. Returns the manifest's path."""
    shards = []
    for split, count in {"train": 6, "val": 2, "test": 3}.items():
        for number, name in enumerate(("cat", "dog")):
            clips = {f"{split}-{name}-{index}": tiny_clip(number, index) for index in range(count)}
            members = [
                (key, {"mp4": data + (key.encode() + END if key in LETHAL else b""), "json": b"{}"})
                for key, data in clips.items()
            ]
            url = shard_url(split, number, name, 0)
            shards.append(write_shard(url, root=str(root), class_name=name, split=split, clips=members))
    Manifest("clip", ("cat", "dog"), tuple(shards), {}).save(f"{root}/manifest.json")
    return load_manifest(f"{root}/manifest.json").root + "/manifest.json"


def _train(folder: Path, fault: str, *settings: str) -> "subprocess.CompletedProcess[str]":
    (folder / fault).mkdir()
    crash = f"os.write(os.open({str(folder / 'crashes')!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY), {TAIL}); {CRASH}"
    (folder / fault / "sitecustomize.py").write_text(decoder_hook(crash if fault == "crash" else DAMAGE))
    words = ["-m", "avcil_dist", "train", str(folder / "video.yaml"), "-n", "2", f"output={folder}/{fault}", *settings]
    environment = os.environ | {"PYTHONPATH": f"{folder}/{fault}:{PROJECT}"}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=False, cwd=folder
    )


def _configure(folder: Path) -> None:
    document = {
        "extends": "base",
        "name": "video",
        "data": {
            "manifest": _shards(folder / "shards"),
            "clip": CLIP,
            "decode_workers": 1,
            "max_bad_fraction": 0.3,
        },
        "scenario": {"classes_per_step": 2},
        "model": {"visual": {"kind": "small"}, "audio": {"kind": "small"}},
        "optim": {"epochs": 2, "global_batch": 4, "global_replay_batch": 2, "global_eval_batch": 4},
    }
    (folder / "video.yaml").write_text(yaml.safe_dump(document))


def test_a_clip_that_crashes_its_decoder_costs_a_training_that_clip_alone(tmp_path: Path) -> None:
    _configure(tmp_path)
    digests = set()
    for fault, line in (("crash", "its decoder crashed (SIGSEGV)"), ("damage", "not a video")):
        done = _train(tmp_path, fault)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        for key in LETHAL:
            assert f"step 0: 1 damaged clip is skipped: {key}: {line}" in done.stderr
        digests.add(weights_digest(f"{tmp_path}/{fault}/video-avcil-seed0", 0))
    assert len(digests) == 1
    crashes = (tmp_path / "crashes").read_bytes().splitlines()
    assert sum(line.endswith(b"val-dog-1" + END) for line in crashes) == 2  # in the first of two validations


def test_a_rank_that_crashes_prints_where(tmp_path: Path) -> None:
    _configure(tmp_path)
    done = _train(tmp_path, "crash", "data.decode_workers=0")
    assert done.returncode == 2
    assert "ended with signal SIGSEGV; run the same command again to continue" in done.stderr
    assert "Fatal Python error: Segmentation fault" in done.stderr
    assert "in open_or_fail" in done.stderr
