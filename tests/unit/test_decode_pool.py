"""Decoding in processes: a clip that crashes its decoder is skipped, counted and named; all others keep their bits."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data import layout
from avcil_dist.data.batch import Batch
from avcil_dist.data.decode_pool import DecodePool, EncodedClip
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import FixedSampler
from avcil_dist.errors import ConfigError
from data_shards.shard_writer import write_shard
from tests.helpers.lethal import BUG, DAMAGED, NOISY, ONCE, SEGFAULT, SILENT, LethalTransform
from tests.helpers.rendered import tiny_clip

pytestmark = pytest.mark.slow  # every test starts processes
CLIP = ClipConfig(frames=2, size=32, mel_bins=16, mel_frames=32)
SHAPES = (2, 3, 32, 32), (32, 16)


def _manifest(root: Path, contents: list[bytes]) -> Manifest:
    clips = [(f"dog-{number}", {"mp4": data, "json": b"{}"}) for number, data in enumerate(contents)]
    shard = write_shard("train/c000-dog-0000.tar", root=str(root), class_name="dog", split="train", clips=clips)
    Manifest("clip", ("dog",), (shard,), {}).save(f"{root}/manifest.json")
    return load_manifest(f"{root}/manifest.json")


def _batches(manifest: Manifest, workers: int, rows: int = 3, lethal: dict[int, str] | None = None) -> list[Batch]:
    numbers = np.arange(-(-manifest.shards[0].count // rows) * rows)
    source = FixedSampler(np.where(numbers < manifest.shards[0].count, numbers, -1).reshape(-1, rows))
    data = DataConfig(manifest="-", decode_workers=workers, clip=CLIP)
    return list(load_batches(source, manifest=manifest, labels={"dog": 0}, data=data, lethal=lethal))


@pytest.fixture
def pool() -> Iterator[DecodePool]:
    pool = DecodePool(LethalTransform(CLIP), SHAPES, 1, {})
    yield pool
    pool.close()


def _target() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(SHAPES[0]), torch.zeros(SHAPES[1])


def _clip(data: bytes, key: str = "dog", number: int = 0) -> EncodedClip:
    return EncodedClip(number, key, memoryview(data), None)


def test_clip_that_crashes_its_decoder_is_skipped_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [tiny_clip(0, number) for number in range(8)]
    expected = _batches(_manifest(tmp_path / "good", good), 0)
    monkeypatch.setattr(layout, "ClipTransform", LethalTransform)
    marker = tmp_path / "ended once"
    contents = [
        *good[:2],
        SEGFAULT,
        NOISY + good[3],
        good[4],
        DAMAGED,
        ONCE + os.fsencode(marker) + b"\n" + good[6],
        good[7],
    ]
    lethal = dict[int, str]()
    batches = _batches(_manifest(tmp_path / "bad", contents), 2, lethal=lethal)
    assert marker.exists()
    assert lethal == {2: "dog-2: its decoder crashed (SIGSEGV)"}
    [later] = _batches(_manifest(tmp_path / "later", good[:3]), 1, lethal=lethal)  # not tried, though it is good
    assert later.valid.tolist() == [True, True, False]
    assert later.faults == ("dog-2: its decoder crashed (SIGSEGV)",)
    assert [batch.faults for batch in batches] == [
        ("dog-2: its decoder crashed (SIGSEGV)",),
        ("dog-5: truncated",),
        (),
    ]
    assert [batch.valid.tolist() for batch in batches] == [
        [True, True, False],
        [True, True, False],
        [True, True, False],
    ]
    for batch, other in zip(batches, expected, strict=True):
        for row in np.flatnonzero(batch.valid.numpy()):
            assert torch.equal(batch.visual[row], other.visual[row])
            assert torch.equal(batch.audio[row], other.audio[row])
        for row in np.flatnonzero(~batch.valid.numpy()):
            assert not batch.visual[row].any()
            assert not batch.audio[row].any()


def test_clip_that_ended_two_processes_is_not_tried_again(pool: DecodePool) -> None:
    for _ in range(2):
        fault = pool.submit(_clip(SEGFAULT), _target())()
        assert str(fault) == "dog: its decoder crashed (SIGSEGV)"
    survivor = pool.submit(_clip(DAMAGED, number=1), _target())  # keys are unique in a split of a class only
    assert str(survivor()) == "dog: truncated"
    processes = psutil.Process().children(recursive=True)
    assert pool.submit(_clip(SEGFAULT), _target())() is not None
    assert {process.pid for process in processes} <= {
        process.pid for process in psutil.Process().children(recursive=True)
    }


def test_bug_in_a_decoding_process_is_raised_in_the_rank(pool: DecodePool) -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        pool.submit(_clip(BUG), _target())()


def test_decoder_that_does_not_answer_is_ended(pool: DecodePool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.submit(_clip(DAMAGED), _target())()  # the start of the process is not limited
    monkeypatch.setattr("avcil_dist.data.decode_pool.MAX_DECODING_SECONDS", 0.1)
    assert str(pool.submit(_clip(SILENT), _target())()) == "dog: its decoder took more than 0.1 s"


class _NoStart(LethalTransform):
    def __setstate__(self, state: object) -> None:
        os._exit(3)


def test_process_that_ends_as_it_starts_is_an_error_of_the_setting() -> None:
    pool = DecodePool(_NoStart(CLIP), SHAPES, 1, {})
    with pytest.raises(ConfigError, match=r"a decoding process ended as it started \(exit code 3\)"):
        pool.submit(_clip(tiny_clip()), _target())()
    pool.close()


def test_end_of_loading_leaves_no_process(tmp_path: Path) -> None:
    manifest = _manifest(tmp_path, [tiny_clip(0, number) for number in range(8)])
    source = FixedSampler(np.arange(8).reshape(-1, 1))
    data = DataConfig(manifest="-", decode_workers=2, clip=CLIP)
    before = set(psutil.Process().children(recursive=True))
    batches = load_batches(source, manifest=manifest, labels={"dog": 0}, data=data)
    next(batches)
    started = [child for child in psutil.Process().children(recursive=True) if child not in before]
    batches.close()  # type: ignore[attr-defined]
    del batches
    decoders = [child for child in started if "forkserver" not in " ".join(_words(child))]
    assert decoders == [] or psutil.wait_procs(decoders, timeout=5)[1] == []


ENDS_WITH_AN_ERROR = """
import sys
from avcil_dist.config.schema import ClipConfig
from avcil_dist.data.decode_pool import DecodePool, EncodedClip
from tests.unit.test_decode_pool import CLIP, DAMAGED, SHAPES, LethalTransform, _target

if __name__ == "__main__":
    pool = DecodePool(LethalTransform(CLIP), SHAPES, 1, {})
    pool.submit(EncodedClip(0, "dog", memoryview(DAMAGED), None), _target())()
    sys.exit(3)
"""


def test_a_rank_that_ends_with_an_error_does_not_wait_for_its_decoders(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(ENDS_WITH_AN_ERROR)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    rank = subprocess.Popen([sys.executable, "rank.py"], cwd=tmp_path, env=environment, start_new_session=True)
    try:
        assert rank.wait(timeout=240) == 3
    finally:
        with suppress(ProcessLookupError):
            os.killpg(rank.pid, signal.SIGKILL)


def _words(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:
        return []
