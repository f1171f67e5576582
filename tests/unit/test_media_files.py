"""Made files of every container, codec, rate and layout, built, cut, and read from a foreign tar in training."""

import io
import tarfile
from functools import cache
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies

from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data.decode import decode_clip, probe_clip
from avcil_dist.data.inputs import FRAME_SHIFT_MS, IMAGENET_MEAN, IMAGENET_STD
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.data.transforms import ClipTransform
from data_shards.build import build_shards
from data_shards.cut import cut_clip
from data_shards.importers.webdataset_tars import import_tars
from tests.helpers.media import step_tones
from tests.helpers.media_files import FAULTY, GOOD, RATE, SECONDS, SPANS, assert_interval, assert_pictures

pytestmark = pytest.mark.slow  # all of them together take some 20 s
torch.set_num_threads(1)
CLIP = ClipConfig(frames=SPANS, size=48, mel_bins=64, mel_frames=round(SECONDS * 100))
START, END = 0.83, 2.47  # of the cuts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every made file, named by its number; the names of all have one ending, whatever they are."""
    folder = tmp_path_factory.mktemp("files")
    for number, made in enumerate(GOOD.values()):
        (folder / f"good{number:02d}.mp4").write_bytes(made.make())
    for number, (make, _) in enumerate(FAULTY.values()):
        (folder / f"faulty{number:02d}.mp4").write_bytes(make())
    return folder


def _members(manifest: Manifest) -> dict[str, bytes]:
    """The bytes of each clip of a manifest, by its key."""
    members = {}
    for number, shard in enumerate(manifest.shards):
        content = Path(manifest.url(number)).read_bytes()
        for key, start, size in zip(shard.keys, shard.offsets["mp4"], shard.sizes["mp4"], strict=True):
            members[key] = content[start : start + size]
    return members


def test_build_takes_every_good_file_and_cut_and_names_the_faults_of_the_others(folder: Path, tmp_path: Path) -> None:
    rows = [f"{folder}/faulty{number:02d}.mp4,dog,train,," for number in range(len(FAULTY))]
    for number, made in enumerate(GOOD.values()):
        rows.append(f"{folder}/good{number:02d}.mp4,dog,train,{START},{END - START}")
        if made.container in ("mp4", "mov"):
            rows.append(f"{folder}/good{number:02d}.mp4,dog,train,,")
    (tmp_path / "clips.csv").write_text("\n".join(["path,label,split,start,duration", *rows]))
    report = build_shards(tmp_path / "clips.csv", str(tmp_path / "out"), clips_per_shard=200, min_seconds=0.5)
    reasons = {Path(rejection.path).stem: rejection.reason for rejection in report.rejected}
    assert sorted(reasons) == [f"faulty{number:02d}" for number in range(len(FAULTY))]
    for number, (name, (_, reason)) in enumerate(FAULTY.items()):
        assert reason in reasons[f"faulty{number:02d}"], name
    members = _members(report.manifest)
    assert len(members) == len(rows) - len(FAULTY)
    for key, data in members.items():
        name, made = list(GOOD.items())[int(key[4:6])]
        start, end = (START, END) if key[6:] else (0.0, SECONDS)
        clip = decode_clip(data, num_frames=SPANS, sample_rate=RATE, silent="error", where=name)
        assert probe_clip(data, name).duration == pytest.approx(end - start, abs=1 / made.fps + 0.03), name
        assert_interval(clip, start, end, made, f"{name}, {start} to {end} s")


def _write_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.glob("*.mp4")):
            for name, data in ((file.name, file.read_bytes()), (f"{file.stem}.cls", b"dog")):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@cache
def _pitch_bins() -> list[int]:
    """The strongest filterbank bin of each half second of the tones."""
    clip = decode_clip(GOOD["mov, 24 bits"].make(), num_frames=1, sample_rate=RATE, silent="error", where="tones")
    clip.waveform.copy_(torch.from_numpy(step_tones(SECONDS, RATE))[: len(clip.waveform)])
    return _strongest_bins(ClipTransform(CLIP)(clip)[1])


def _strongest_bins(filterbank: torch.Tensor) -> list[int]:
    each = 500 // FRAME_SHIFT_MS
    spans = [filterbank[half * each + 8 : (half + 1) * each - 8] for half in range(int(2 * SECONDS))]
    return [int(span.mean(0).argmax()) for span in spans]


def test_training_reads_every_file_of_a_foreign_tar_and_names_the_damaged_ones(folder: Path, tmp_path: Path) -> None:
    _write_tar(tmp_path / "dog.tar", folder)
    import_tars([str(tmp_path / "dog.tar")], str(tmp_path / "manifest.json"), split="train")
    manifest = load_manifest(str(tmp_path / "manifest.json"))
    source = FixedSampler(np.arange(len(GOOD) + len(FAULTY))[:, None])
    data = DataConfig(manifest="-", decode_workers=0, clip=CLIP)
    batches = list(load_batches(source, manifest=manifest, labels={"dog": 0}, data=data))
    files = dict(zip(manifest.shards[0].keys, batches, strict=True))
    for number, (name, (_, reason)) in enumerate(FAULTY.items()):
        batch = files[f"faulty{number:02d}"]
        assert not batch.valid.any(), name
        assert batch.faults[0].startswith(f"faulty{number:02d}: "), name
        assert reason in batch.faults[0], name
    for number, (name, made) in enumerate(GOOD.items()):
        batch = files[f"good{number:02d}"]
        assert batch.faults == (), name
        green = batch.visual[0, :, 1, CLIP.size // 2, CLIP.size // 2] * IMAGENET_STD[1] + IMAGENET_MEAN[1]
        assert_pictures((255 * green).round().int().tolist(), 0.0, SECONDS, made, name)
        assert _strongest_bins(batch.audio[0]) == pytest.approx(_pitch_bins(), abs=1), name


@hypothesis.settings(max_examples=120, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    number=strategies.integers(0, len(GOOD) - 1),
    start=strategies.floats(0, SECONDS - 0.4).map(lambda value: round(value, 3)),
    duration=strategies.floats(0.3, SECONDS).map(lambda value: round(value, 3)),
)
def test_any_cut_of_any_file_shows_its_interval(folder: Path, number: int, start: float, duration: float) -> None:
    name, made = list(GOOD.items())[number]
    end = min(start + duration, SECONDS)
    data = cut_clip(f"{folder}/good{number:02d}.mp4", start, duration)
    clip = decode_clip(data, num_frames=SPANS, sample_rate=RATE, silent="error", where=name)
    assert probe_clip(data, name).duration == pytest.approx(end - start, abs=1 / made.fps + 0.03)
    assert_interval(clip, start, end, made, f"{name}, {start} to {end} s")
