import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcil_dist import storage
from avcil_dist.config.schema import DataConfig
from avcil_dist.data import clip_table_file
from avcil_dist.data.clip_table import ClipTable, Rows, join
from avcil_dist.data.clip_table_file import open_table, write_table
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.shard import Shard
from avcil_dist.errors import DataError
from data_shards.random_features import make_feature_shards

REGIONS = [None, (0.0, 0.25, 0.5, 1.0), (0.1, 0.2, 0.3, 0.4), None]


def table_of(prefix: str, count: int = 4, *, member: str = "mp4", first: int = 512, regions: bool = True) -> ClipTable:
    keys = [f"{prefix}{'x' * row}" for row in range(count)]
    offsets = {member: np.arange(count) * 1024 + first}
    return ClipTable.of(keys, offsets, {member: np.arange(count) + 7}, REGIONS[:count] if regions else None)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return make_feature_shards(tmp_path / "data", classes=2, clips={"train": 6, "test": 1}, clips_per_shard=4)


@pytest.fixture
def mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every table is mapped, as a large one is, and no other test has verified it."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(clip_table_file, "SMALL_BYTES", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def table_path(url: str) -> Path:
    [path] = Path(url).parent.glob("clips-*.npz")
    return path


def test_rows_of_tables_are_joined_in_their_order() -> None:
    one, other = table_of("a"), table_of("b", member="webm", first=1 << 33, regions=False)
    chosen = one.select(np.array([3, 1])).select(np.array([1]))
    joined = join([Rows(one, 1, 2), Rows(other, 0, 4), Rows(chosen, 0, 1), Rows(one, 0, 0)])
    assert len(joined) == 7
    assert joined.keys(0, 7) == ["ax", "axx", "b", "bx", "bxx", "bxxx", "ax"]
    assert [joined.key(row) for row in range(7)] == joined.keys(0, 7)
    assert joined.keys(3, 2) == ["bx", "bxx"]
    assert [joined.region(row) for row in range(7)] == [*REGIONS[1:3], None, None, None, None, REGIONS[1]]
    offsets, sizes = joined.spans("webm", np.arange(7))
    assert offsets.tolist() == [0, 0, *((1 << 33) + 1024 * row for row in range(4)), 0]
    assert offsets.dtype == sizes.dtype == np.int64
    assert joined.columns["offset.webm"].dtype == np.int64
    assert joined.columns["offset.mp4"].dtype == np.uint32
    assert joined.spans("mp4", np.array([6, 0]))[1].tolist() == [8, 8]


def test_chosen_rows_have_the_values_of_these_rows() -> None:
    chosen = table_of("a").select(np.array([2, 0, 3]))
    assert [chosen.key(row) for row in range(3)] == chosen.keys(0, 3) == ["axx", "a", "axxx"]
    assert chosen.spans("mp4", np.arange(3))[0].tolist() == [2560, 512, 3584]
    assert [chosen.region(row) for row in range(3)] == [REGIONS[2], None, None]
    with pytest.raises(KeyError):
        chosen.spans("webm", np.arange(3))


def test_numpy_reads_the_file_of_a_table(url: str) -> None:
    manifest = load_manifest(url)
    with np.load(table_path(url), allow_pickle=False) as columns:
        assert bytes(columns["keys"]).decode().split() == [key for shard in manifest.shards for key in shard.keys]
        starts, _ = manifest.spans("visual.npy", np.arange(14))
        np.testing.assert_array_equal(columns["offset.visual.npy"], starts)


@pytest.mark.usefixtures("mapped")
def test_a_mapped_table_is_the_one_in_memory(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = load_manifest(url)
    monkeypatch.setattr(clip_table_file, "SMALL_BYTES", 1 << 20)
    small = load_manifest(url)
    assert [shard.to_dict() for shard in mapped.shards] == [shard.to_dict() for shard in small.shards]
    np.testing.assert_array_equal(mapped.spans("json", np.arange(14)), small.spans("json", np.arange(14)))
    for values in mapped.shards[0].table.columns.values():
        assert values.flags.aligned
        assert not values.flags.writeable


@pytest.mark.usefixtures("mapped")
def test_a_large_table_is_verified_once_until_its_file_is_another(tmp_path: Path) -> None:
    folder, calls = str(tmp_path / "set"), []
    record = write_table(folder, [Rows(table_of("a"), 0, 4)])

    def opened(owner: str = "0") -> int:
        open_table(folder, record, count=4, check=calls.append, owner=owner)
        return len(calls)

    assert [opened(), opened(), opened("1"), opened("1")] == [1, 1, 2, 2]
    os.utime(f"{folder}/{record.url}", ns=(0, 0))
    assert [opened(), opened()] == [3, 3]
    [marked] = (tmp_path / "tmp").iterdir()
    marked.chmod(0o777)  # others may have written the markers
    assert [opened(), opened()] == [4, 5]


@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.usefixtures("mapped")
def test_a_damaged_table_is_named(url: str, is_large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_large:
        monkeypatch.setattr(clip_table_file, "SMALL_BYTES", 1 << 20)
    path = table_path(url)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"train-000-00003", b"train-000-00009"))
    with pytest.raises(DataError, match=rf"damaged manifest: {path.name}: its sha256 is not that of the manifest"):
        load_manifest(url)
    path.write_bytes(data[:-1])
    with pytest.raises(DataError, match=rf"{path.name}: (its sha256|{len(data) - 1} bytes)"):
        load_manifest(url)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: (missing|cannot be read)"):
        load_manifest(url)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["columns"]["keys"].update(count=1 << 40), "column keys: not within the file"),
        (lambda c: c["columns"]["keys"].update(offset=3), "column keys: not within the file"),
        (lambda c: c["columns"]["keys"].update(dtype="float64", count=1), "column keys: of float64, not of uint8"),
        (lambda c: c["columns"]["key_ends"].update(count=3), "column key_ends: 3 values, but 14 clips"),
        (lambda c: c["columns"]["size.json"].update(dtype="uint8"), "column size.json: of uint8, not of uint32 or"),
        (lambda c: c["columns"].pop("size.json"), "column offset.json: not both offset and size"),
        (lambda c: [c["columns"].pop(f"{kind}.json") for kind in ("size", "offset")], "no column of member json"),
        (lambda c: c["columns"].pop("keys"), "no column keys"),
        (lambda c: c.update(url="../clips.npz"), "not a plain path below the folder"),
        (lambda c: c["columns"]["keys"].update(offset=c["columns"]["key_ends"]["offset"]), "not 4 keys"),
        (lambda c: c["columns"].update({"size.json": c["columns"]["offset.json"]}), "is beyond the shard's"),
    ],
)  # fmt: skip
def test_a_table_that_no_writer_makes_is_refused(url: str, change: Callable[[Any], Any], message: str) -> None:
    document = json.loads(Path(url).read_text())
    change(document["clips"])
    del document["hash"]
    digest = storage.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode())
    storage.write_json(url, document | {"hash": digest})
    with pytest.raises(DataError, match="damaged manifest: ") as caught:
        load_manifest(url)
    assert message in str(caught.value)


@pytest.mark.usefixtures("mapped")
def test_a_remote_table_is_fetched_into_the_shard_cache_once(url: str, tmp_path: Path) -> None:
    remote = f"memory://{tmp_path.name}"
    for path in (Path(url), table_path(url)):
        storage.write_bytes(f"{remote}/{path.name}", path.read_bytes())
    data = DataConfig(manifest=f"{remote}/manifest.json", shard_cache=str(tmp_path / "cache"))
    for settings in (data, data, data.model_copy(update={"shard_cache": "none"})):
        manifest = load_manifest(data.manifest, settings)
        assert manifest.key(13) == "test-001-00000"
    [cached] = (tmp_path / "cache" / "avcil-shards").glob("*.tar")
    assert cached.read_bytes() == table_path(url).read_bytes()
    assert replace(manifest).content_hash == manifest.content_hash
    storage.remove_tree(remote)


@pytest.mark.parametrize(
    ("place", "size", "region", "message"),
    [
        (512, (1 << 63) - 100, None, "mp4: an offset or size is beyond the shard's 2000 bytes"),
        ((1 << 63) - 100, 200, None, "mp4: an offset or size is beyond the shard's 2000 bytes"),
        (512, -1, None, "mp4: an offset or size is beyond the shard's 2000 bytes"),
        (512, 100, (0.0, 0.5, 1.5, 1.0), "a region that is not four fractions"),
        (512, 100, (0.0, float("nan"), 1.0, 1.0), "a region that is not four fractions"),
    ],
)
def test_values_that_no_clip_can_have_are_refused(place: int, size: int, region: Any, message: str) -> None:
    good = {"mp4": np.array([512, 1024])}, {"mp4": np.array([488, 488])}
    Shard.of("a.tar", "dog", "train", 2000, "0" * 64, ["a", "b"], *good, [None, (0.0, 0.0, 1.0, 1.0)]).check()
    spans = {"mp4": np.array([512, place])}, {"mp4": np.array([488, size])}
    shard = Shard.of("a.tar", "dog", "train", 2000, "0" * 64, ["a", "b"], *spans, [None, region])
    with pytest.raises(DataError, match=message):
        shard.check()


def test_the_clips_of_several_tables_are_found(url: str) -> None:
    manifest = load_manifest(url)
    first, *others = manifest.shards
    keys = ["a", "b"]
    spans = {name: np.array([512, 4096]) for name in first.members}
    added = Shard.of("x.tar", "class_000", "train", 1 << 20, "0" * 64, keys, spans, spans)
    part = replace(first, table=first.table.select(np.array([3, 1])), count=2)
    joined = Manifest(manifest.kind, manifest.classes, (*others, added, part), manifest.shape)
    everything = np.arange(int(joined.first_clips[-1]))
    assert [joined.key(clip) for clip in everything] == [key for shard in joined.shards for key in shard.keys]
    for member in first.members:
        offsets, sizes = joined.spans(member, everything[::-1])
        assert offsets[::-1].tolist() == [value for shard in joined.shards for value in shard.offsets[member].tolist()]
        assert sizes[::-1].tolist() == [value for shard in joined.shards for value in shard.sizes[member].tolist()]
    assert joined.spans("json", np.array([-1, 0]))[0][1] == joined.spans("json", np.array([0]))[0][0]
    assert joined.clip_numbers("class_000", ["train-000-00003", "b"]).tolist() == [12, 11]
