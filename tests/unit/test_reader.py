"""Reader: the same batches from every location, damaged shards, resumption, counters."""

import gc
import io
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist import storage
from avcil_dist.data import reader
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.shard import Shard
from data_shards.random_features import make_feature_shards
from data_shards.shard_writer import write_shard
from tests.helpers.reading import clips_in_order, digests, rows, total, training_batches, training_source

CLIPS = 12
BLOCK = 512


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes in 8 shards."""
    folder = tmp_path_factory.mktemp("shards")
    make_feature_shards(folder, classes=4, clips={"train": 12, "val": 2}, clips_per_shard=6)
    return folder


@pytest.fixture(params=["local", "ranges", "cache"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[Path], tuple[str, dict[str, object]]]]:
    """Puts a folder of shards where it is read in one of the three ways: its manifest and the settings."""
    root = f"memory://{uuid.uuid4().hex}"

    def put(folder: Path) -> tuple[str, dict[str, object]]:
        if request.param == "local":
            return f"{folder}/manifest.json", {"shard_cache": "none"}
        for path in folder.rglob("*"):
            if path.is_file():
                storage.write_bytes(f"{root}/{path.relative_to(folder)}", path.read_bytes())
        cache = "none" if request.param == "ranges" else str(tmp_path / "cache")
        return f"{root}/manifest.json", {"shard_cache": cache}

    yield put
    storage.remove_tree(root)


def features_of(folder: Path, shard: Shard) -> list[np.ndarray]:
    """Visual features of the shard's clips, read in the plainest way."""
    data = (folder / shard.url).read_bytes()
    return [np.load(io.BytesIO(data[offset:])) for offset in shard.offsets["visual.npy"]]


def test_batches_hold_the_clips_of_the_plan(shards: Path) -> None:
    url = f"{shards}/manifest.json"
    manifest = load_manifest(url)
    planned = training_source(manifest).epoch_batches(0)
    batches = list(training_batches(url))
    assert len(batches) == len(planned) == 6
    stored = np.stack([array for shard in manifest.shards for array in features_of(shards, shard)])
    for batch, clips in zip(batches, planned, strict=True):
        assert batch.valid.all()
        np.testing.assert_array_equal(batch.visual.numpy().reshape(8, 6, 16), stored[clips])
        assert batch.labels.tolist() == [manifest.classes.index(manifest.class_of(clip)) for clip in clips]


def test_every_way_gives_the_same_batches(shards: Path, place: Callable[..., tuple[str, dict[str, object]]]) -> None:
    url, settings = place(shards)
    assert digests(url, epochs=2, **settings) == digests(f"{shards}/manifest.json", epochs=2)


def test_batches_that_are_kept_are_not_written_over(shards: Path) -> None:
    url = f"{shards}/manifest.json"
    kept = [batch.visual.clone() for batch in training_batches(url, epochs=3)]
    held = list(training_batches(url, epochs=3))
    assert all(torch.equal(one, other.visual) for one, other in zip(kept, held, strict=True))


def test_reading_resumes_at_any_batch_exemplars_included(shards: Path) -> None:
    url = f"{shards}/manifest.json"
    manifest = load_manifest(url)
    exemplars = manifest.clips(["class_000"], "train")[:5]
    whole = digests(url, epochs=2, exemplars=exemplars)
    for start in (1, 4, 5, len(whole) - 1):
        assert digests(url, epochs=2, exemplars=exemplars, start=start) == whole[start:]


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_their_shares_of_one_rank(shards: Path, ranks: int) -> None:
    url = f"{shards}/manifest.json"
    whole = rows(list(training_batches(url)))[0]
    shares = [rows(list(training_batches(url, rank=rank, ranks=ranks)))[0] for rank in range(ranks)]
    by_batch = torch.stack([share.view(6, 8 // ranks, *share.shape[1:]) for share in shares], dim=1)
    assert torch.equal(by_batch.flatten(0, 2), whole)


def test_features_in_another_type_are_converted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float32)
    stored = {"visual.npy": npy(values), "audio.npy": npy(np.asfortranarray(values[0]))}
    url = one_shard(tmp_path, [("a", stored), ("b", stored | {"visual.npy": npy(np.float16(values).copy(order="F"))})])
    visual, audio, valid = rows(clips_in_order(url, rows=2))
    assert valid.tolist() == [True, True]
    for row in range(2):
        np.testing.assert_array_equal(visual[row].numpy().reshape(6, 16), values.astype(np.float16))
        np.testing.assert_array_equal(audio[row].numpy(), values[0].astype(np.float16))


@pytest.mark.parametrize(
    "stored",
    [
        lambda good: good | {"visual.npy": npy(np.zeros((5, 16), np.float16))},
        lambda good: good | {"visual.npy": b"\x93NUMPY" + bytes(len(good["visual.npy"]) - 6)},
        lambda good: good | {"audio.npy": b""},
        lambda good: good | {"audio.npy": pickled()},
    ],
    ids=["another shape", "a damaged header", "empty", "pickled"],
)
def test_a_member_that_holds_no_features_is_a_damaged_clip(
    tmp_path: Path, stored: Callable[..., dict[str, bytes]]
) -> None:
    values = np.ones((6, 16), np.float16)
    good = {"visual.npy": npy(values), "audio.npy": npy(values[0])}
    url = one_shard(tmp_path, [("good", good), ("bad", stored(good))])
    (batch,) = clips_in_order(url, rows=2)
    assert batch.valid.tolist() == [True, False]
    assert batch.visual[1].count_nonzero() == 0
    assert batch.audio[1].count_nonzero() == 0
    assert batch.visual[0].float().mean() == 1
    assert len(batch.faults) == 1
    assert "bad" in batch.faults[0]
    assert "\n" not in batch.faults[0]


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def one_shard(folder: Path, clips: list[tuple[str, dict[str, bytes]]]) -> str:
    shard = write_shard("a.tar", root=str(folder), class_name="c", split="train", clips=clips)
    url = f"{folder}/manifest.json"
    Manifest("feature", ("c",), (shard,), {"frames": 2, "positions": 3, "dim": 16}).save(url)
    return url


def cut_at_a_block(path: Path, shard: Shard) -> set[int]:
    path.write_bytes(path.read_bytes()[: int(shard.offsets["visual.npy"][2]) - BLOCK])
    return {2, 3, 4, 5}


def cut_within_a_member(path: Path, shard: Shard) -> set[int]:
    path.write_bytes(path.read_bytes()[: int(shard.offsets["visual.npy"][4]) + 100])
    return {4, 5}


def zero_a_member(path: Path, shard: Shard) -> set[int]:
    data = bytearray(path.read_bytes())
    start, size = int(shard.offsets["visual.npy"][1]), int(shard.sizes["visual.npy"][1])
    data[start : start + size] = bytes(size)
    path.write_bytes(data)
    return {1}


def give_a_key_a_dot(path: Path, shard: Shard) -> set[int]:
    data = bytearray(path.read_bytes())
    data[int(shard.offsets["audio.npy"][3]) - BLOCK + 1] = ord(".")
    path.write_bytes(data)
    return {3}


def take_another_shard_of_that_size(path: Path, shard: Shard) -> set[int]:
    shutil.copy(path.with_name(path.name.replace("0000.tar", "0001.tar")), path)
    return {0, 1, 2, 3, 4, 5}


DAMAGES = [cut_at_a_block, cut_within_a_member, zero_a_member, give_a_key_a_dot, take_another_shard_of_that_size]


@pytest.mark.parametrize("damage", DAMAGES)
def test_of_a_damaged_shard_the_intact_clips_are_read_the_others_are_named(
    shards: Path, tmp_path: Path, place: Callable[..., tuple[str, dict[str, object]]], damage: Callable[..., set[int]]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(shards, folder)
    manifest = load_manifest(f"{folder}/manifest.json")
    number = next(n for n, shard in enumerate(manifest.shards) if shard.url.startswith("train/c001"))
    first = int(manifest.first_clips[number]) - sum(s.count for s in manifest.shards[:number] if s.split != "train")
    broken = damage(folder / manifest.shards[number].url, manifest.shards[number])
    url, settings = place(folder)
    if settings["shard_cache"] != "none":
        broken = set(range(6))  # the cache verifies the digest of the whole shard
    expected = {first + row for row in broken}
    batches = clips_in_order(url, **settings)
    visual, audio, valid = rows(batches)
    assert set(np.flatnonzero(~valid.numpy())) == expected
    good = clips_in_order(f"{shards}/manifest.json")
    for found, wanted in zip((visual, audio), rows(good)[:2], strict=True):
        assert torch.equal(found[valid], wanted[valid])
        assert not found[~valid].any()
    faults = [fault for batch in batches for fault in batch.faults]
    keys = {manifest.shards[number].keys[row] for row in broken}
    assert len(faults) == len(keys)
    assert all(any(key in fault for fault in faults) for key in keys)
    assert all("\n" not in fault for fault in faults)


def test_clips_of_a_missing_shard_are_named(
    shards: Path, tmp_path: Path, place: Callable[..., tuple[str, dict]]
) -> None:
    folder = tmp_path / "less"
    shutil.copytree(shards, folder)
    missing = next(shard for shard in load_manifest(f"{folder}/manifest.json").shards if shard.split == "train")
    (folder / missing.url).unlink()
    url, settings = place(folder)
    faults = [fault for batch in clips_in_order(url, **settings) for fault in batch.faults]
    assert len(faults) == 6
    assert all(f"{missing.url}: clip {key}: missing" in fault for fault, key in zip(faults, missing.keys, strict=True))


def test_only_what_the_manifest_lists_is_read(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(shards, folder)
    for path in list((folder / "train").iterdir()):
        shutil.copy(path, path.with_name(f"0-{path.name}"))
    assert digests(f"{folder}/manifest.json") == digests(f"{shards}/manifest.json")


def test_bytes_and_shards_are_counted(shards: Path, tmp_path: Path, place: Callable[..., tuple[str, dict]]) -> None:
    url, settings = place(shards)
    counts = total(list(training_batches(url, epochs=2, **settings)))
    shard = load_manifest(url).shards[0]
    size = int(shard.sizes["visual.npy"][0] + shard.sizes["audio.npy"][0]) + 2 * BLOCK
    assert counts["read_bytes"] == 2 * 48 * size
    assert counts["stall_seconds"] > 0
    if settings["shard_cache"] != "none":
        stored = sum(shard.bytes for shard in load_manifest(url).shards if shard.split == "train")
        assert counts["fetched_bytes"] == stored
        assert counts["cache_misses"] == 8
    elif url.startswith("memory"):
        assert counts["fetched_bytes"] >= counts["read_bytes"]
    else:
        assert counts["fetched_bytes"] == 0


def test_a_read_that_returns_few_bytes_at_a_time_is_continued(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{shards}/manifest.json"
    whole = digests(url)
    preadv = os.preadv

    def read_little(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(descriptor, [buffers[0][:100]], offset)

    monkeypatch.setattr(os, "preadv", read_little)
    assert digests(url) == whole


def open_shards() -> int:
    """The shards that this process has open, in the cache or as files."""
    paths = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed in the meantime, such as the one of the listing
            paths.append(descriptor.readlink())
    return sum(path.suffix == ".tar" for path in paths)


@pytest.mark.parametrize("cached", [False, True], ids=["local files", "shard cache"])
def test_shards_are_closed_after_their_last_use(tmp_path: Path, cached: bool) -> None:
    folder = tmp_path / "many"
    url = make_feature_shards(folder, classes=40, clips={"train": 2}, clips_per_shard=2)
    settings: dict[str, object] = {"shard_cache": str(tmp_path / "cache")} if cached else {"shard_cache": "none"}
    before = open_shards()
    opened = [open_shards() - before for _ in training_batches(url, epochs=2, batch=2, **settings)]
    assert len(opened) == 80
    assert max(opened) > 0
    assert max(opened) <= 16  # of 40: those of the batches ahead
    assert open_shards() == before


def test_a_reader_that_is_left_early_closes_its_shards(tmp_path: Path) -> None:
    url = make_feature_shards(tmp_path / "many", classes=10, clips={"train": 2}, clips_per_shard=2)
    before = open_shards()
    batches = training_batches(url, epochs=2, batch=2)
    next(batches)
    assert open_shards() > before
    del batches
    gc.collect()
    assert open_shards() == before


def test_exemplars_do_not_bring_whole_shards_into_the_cache(shards: Path, tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for path in shards.rglob("*.*"):
        storage.write_bytes(f"{root}/{path.relative_to(shards)}", path.read_bytes())
    manifest = load_manifest(f"{root}/manifest.json")
    exemplars = manifest.clips(["class_000"], "train")[[0, 6]]  # one of each shard
    settings: dict[str, object] = {"exemplars": exemplars, "shard_cache": str(tmp_path / "cache")}
    batches = list(training_batches(f"{root}/manifest.json", **settings))
    assert total(batches)["cache_misses"] == 6
    assert all(batch.valid.all() for batch in batches)
    storage.remove_tree(root)


def test_a_cache_smaller_than_the_window_gives_the_same_batches(shards: Path, tmp_path: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    for path in shards.rglob("*.*"):
        storage.write_bytes(f"{root}/{path.relative_to(shards)}", path.read_bytes())
    largest = max(shard.bytes for shard in load_manifest(f"{root}/manifest.json").shards)
    cached = list(
        training_batches(
            f"{root}/manifest.json", shard_cache=str(tmp_path / "cache"), shard_cache_gigabytes=2 * largest / 1e9
        )
    )
    assert total(cached)["cache_full"] > 0
    plain = rows(list(training_batches(f"{shards}/manifest.json")))
    assert all(torch.equal(one, other) for one, other in zip(rows(cached), plain, strict=True))
    storage.remove_tree(root)


def test_segments_are_read_together_up_to_16_mebibytes_and_small_gaps() -> None:
    size, gap = 5 << 20, reader.GAP_BYTES
    buffer = memoryview(bytearray(size))

    def segment(shard: int, start: int) -> reader.Segment:
        return reader.Segment(shard, start, (buffer,), 0)

    def starts(*segments: reader.Segment) -> list[list[int]]:
        return [[part.start for part in run] for run in reader._runs(segments)]

    assert starts(*(segment(0, number * size) for number in (3, 1, 0, 2))) == [[0, size, 2 * size], [3 * size]]
    assert starts(segment(0, 0), segment(0, size + gap)) == [[0, size + gap]]
    assert starts(segment(0, 0), segment(0, size + gap + 1)) == [[0], [size + gap + 1]]
    assert starts(segment(0, 0), segment(1, size)) == [[0], [size]]
    half = memoryview(bytearray(8 << 20))
    exact = [reader.Segment(0, start, (half,), 0) for start in (0, 8 << 20)]
    assert len(reader._runs(exact)) == 1
    over = [exact[0], reader.Segment(0, (8 << 20) + 1, (half,), 0)]
    assert len(reader._runs(over)) == 2
