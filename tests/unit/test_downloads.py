"""Downloads of published data sets from a real local server: resumed, verified, unpacked, imported."""

import dataclasses
import hashlib
import json
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from avcil_dist.data.manifest import load_manifest
from avcil_dist.errors import AvcilError, ConfigError, DataError, StorageError
from data_shards.downloads import disk, transfer
from data_shards.downloads.archives import unpack_features
from data_shards.downloads.get import Fetched, Keep, Meters, get_data_set, is_imported, list_files
from data_shards.downloads.http import HttpSource
from data_shards.downloads.sources import DATA_SETS, FEATURES_REPOSITORY, DataSet
from data_shards.downloads.transfer import CutError, StorageSource
from launch.cli.main import cli
from tests.helpers.published_forms import make_benchmark, save_pickled_dict
from tests.helpers.published_server import COMMIT, PublishedServer

POSITIONS, DIM = 2, 3
QUIET = Meters(*[lambda done, total: None] * 4)
HDF5_NAME = "visual_features.h5"


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.delenv("AVCIL_DATA_MIRROR", raising=False)


def _write_archive(root: Path, seed: int) -> None:
    """Write the archive of the released features, in the published form of AVE, to a mirror with its lists."""
    labels = np.load(root / "data/AVE/all_id_category_dict.npy", allow_pickle=True).item()
    random = np.random.default_rng(seed)
    with zipfile.ZipFile(root / "AVE_features.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for kind, shape in (("audio", (DIM,)), ("visual", (8 * POSITIONS, DIM))):
            values = {key: random.normal(size=shape).astype(np.float32) for split in labels.values() for key in split}
            path = save_pickled_dict(root.parent / f"made/{kind}.npy", values)
            archive.write(path, f"AVE/{kind}_pretrained_feature/{kind}_pretrained_feature_dict.npy")


def _interrupt(done: int) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A mirror of made lists and features, in the published paths."""
    root = tmp_path / "mirror"
    make_benchmark(root / "data/AVE", "AVE")
    (tmp_path / "made").mkdir()
    _write_archive(root, seed=0)
    return root


@pytest.fixture
def ave(mirror: Path) -> DataSet:
    """AVE with the digests of the made lists."""
    known = DATA_SETS["ave"]
    lists = tuple(
        dataclasses.replace(file, sha256=hashlib.sha256((mirror / file.path).read_bytes()).hexdigest())
        for file in known.lists
    )
    return dataclasses.replace(known, lists=lists)


def _get(data_set: DataSet, folder: Path, mirror: str | None, keep: Keep = "archives") -> Fetched:
    listed = list_files(data_set, folder, mirror)
    return get_data_set(data_set, listed, folder, f"{folder}/shards", keep=keep, meters=QUIET)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no-ranges"])
def test_a_mirror_gives_shards_and_a_second_get_downloads_nothing(
    tmp_path: Path, mirror: Path, ave: DataSet, ranges: bool
) -> None:
    with PublishedServer(mirror, ranges=ranges) as server:
        report = _get(ave, tmp_path / "ave", server.url).report
        assert report is not None
        assert report.rejected == ()
        assert sum(shard.count for shard in load_manifest(report.manifest_url).shards) == 91
        before = len(server.requests)
        _get(ave, tmp_path / "ave", server.url)
        assert len(server.requests) == before
    assert not (tmp_path / "ave/unpacked").exists()
    recorded = json.loads((tmp_path / "ave/downloads/downloads.json").read_text())["files"]["AVE_features.zip"]
    assert recorded["sha256"] == hashlib.sha256((mirror / "AVE_features.zip").read_bytes()).hexdigest()
    assert recorded["source"] == f"{server.url}/AVE_features.zip"


def test_the_hub_gives_the_features_at_a_recorded_commit(
    tmp_path: Path, mirror: Path, ave: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = (mirror / "AVE_features.zip").read_bytes()
    with PublishedServer(mirror, {FEATURES_REPOSITORY: {"AVE_features.zip": archive}}) as server:
        monkeypatch.setattr(
            "huggingface_hub.constants.ENDPOINT", server.url
        )  # as HF_ENDPOINT at the start of a process
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        local = dataclasses.replace(
            ave, lists=tuple(dataclasses.replace(file, url=f"{server.url}/{file.path}") for file in ave.lists)
        )
        listed = list_files(local, tmp_path / "ave", None)
        assert [entry.revision for entry in listed] == ["", "", "", COMMIT]
        assert listed[-1].size == len(archive)
        assert listed[-1].hub_sha256 == hashlib.sha256(archive).hexdigest()
        _get(local, tmp_path / "ave", None)
    lock = json.loads((tmp_path / "ave/downloads/downloads.json").read_text())
    assert lock["files"]["AVE_features.zip"]["revision"] == COMMIT


def test_archives_that_a_mirror_lacks_come_from_the_hub(
    tmp_path: Path, mirror: Path, ave: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = (mirror / "AVE_features.zip").read_bytes()
    (mirror / "AVE_features.zip").unlink()
    with PublishedServer(mirror, {FEATURES_REPOSITORY: {"AVE_features.zip": archive}}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        for place in (server.url, str(mirror)):
            assert [entry.revision for entry in list_files(ave, tmp_path / "ave", place)] == ["", "", "", COMMIT]
        server.hub.clear()
        with pytest.raises(DataError, match=r"AVE_features\.zip: missing.*; nor does the hub give it: "):
            list_files(ave, tmp_path / "ave", str(mirror))


def test_a_folder_is_a_mirror_in_place(tmp_path: Path, mirror: Path, ave: DataSet) -> None:
    fetched = _get(ave, tmp_path / "ave", str(mirror), keep="nothing")
    assert fetched.paths["AVE_features.zip"] == mirror / "AVE_features.zip"
    assert fetched.paths["AVE_features.zip"].is_file()  # others' files stay
    assert is_imported(ave, tmp_path / "ave", f"{tmp_path}/ave/shards")
    assert not is_imported(ave, tmp_path / "ave", f"{tmp_path}/elsewhere")


def test_without_archives_nothing_is_downloaded_again(tmp_path: Path, mirror: Path, ave: DataSet) -> None:
    with PublishedServer(mirror) as server:
        _get(ave, tmp_path / "ave", server.url, keep="nothing")
    assert not (tmp_path / "ave/downloads/AVE_features.zip").exists()
    assert is_imported(ave, tmp_path / "ave", f"{tmp_path}/ave/shards")


@pytest.mark.parametrize("keep", ["archives", "nothing"])
def test_the_second_of_two_gets_downloads_nothing(
    tmp_path: Path, mirror: Path, ave: DataSet, caplog: pytest.LogCaptureFixture, keep: Keep
) -> None:
    second: list[Future[Fetched]] = []

    def start_another(done: int, total: int) -> None:
        while not caplog.records and not (second and second[0].done()):  # until it waits for the first
            second[:] = second or [pool.submit(_get, ave, tmp_path / "ave", server.url, keep)]
            wait(second, timeout=0.01)

    with PublishedServer(mirror) as server, ThreadPoolExecutor() as pool:
        listed = list_files(ave, tmp_path / "ave", server.url)
        meters = dataclasses.replace(QUIET, download=start_another)
        get_data_set(ave, listed, tmp_path / "ave", f"{tmp_path}/ave/shards", keep=keep, meters=meters)
        assert second[0].result().report is None
        gets = [path for method, path, _ in server.requests if method == "GET"]
    assert len(gets) == len(set(gets)) == len(ave.files)


def test_cut_connections_are_continued(tmp_path: Path, mirror: Path) -> None:
    data = (mirror / "AVE_features.zip").read_bytes()
    with PublishedServer(mirror) as server:
        server.cut_after = len(data) // 5
        seen: list[int] = []
        transfer.transfer(HttpSource(f"{server.url}/AVE_features.zip"), tmp_path / "file", seen.append)
        starts = [start for method, _, start in server.requests if method == "GET"]
    assert (tmp_path / "file").read_bytes() == data
    assert starts == sorted(set(starts))
    assert len(starts) in (5, 6)
    assert seen[-1] == len(data)
    assert [path.name for path in tmp_path.glob(".file*")] == []


def test_an_interrupted_download_continues_in_another_run(tmp_path: Path, mirror: Path) -> None:
    data = (mirror / "AVE_features.zip").read_bytes()
    with PublishedServer(mirror) as server:
        source = HttpSource(f"{server.url}/AVE_features.zip")
        server.cut_after = 1000
        with pytest.raises(KeyboardInterrupt):
            transfer.transfer(source, tmp_path / "file", _interrupt)
        assert transfer.bytes_here(tmp_path / "file") == 1000
        server.cut_after = None
        transfer.transfer(source, tmp_path / "file")
        assert server.requests[-1][2] == 1000
    assert (tmp_path / "file").read_bytes() == data


@pytest.mark.parametrize("kind", ["http", "storage"])
@pytest.mark.parametrize("is_changed", [False, True], ids=["same", "changed"])
def test_a_whole_part_is_downloaded_again_only_if_the_file_changed(
    tmp_path: Path, mirror: Path, kind: str, is_changed: bool
) -> None:
    def interrupt(done: int) -> None:
        if done == 3000:
            raise KeyboardInterrupt

    file, seen = mirror / "list.csv", list[int]()
    file.write_bytes(b"a" * 3000)
    with PublishedServer(mirror) as server:
        source = HttpSource(f"{server.url}/list.csv") if kind == "http" else StorageSource(str(file))
        with pytest.raises(KeyboardInterrupt):
            transfer.transfer(source, tmp_path / "file", interrupt)
        assert transfer.bytes_here(tmp_path / "file") == 3000
        if is_changed:
            file.write_bytes(b"b" * 3000)
        transfer.transfer(source, tmp_path / "file", seen.append)
    assert seen == [3000] * is_changed
    assert (tmp_path / "file").read_bytes() == file.read_bytes()


def test_a_size_alone_does_not_make_a_part_whole(tmp_path: Path, mirror: Path) -> None:
    (mirror / "list.csv").write_bytes(b"a" * 3000)
    with PublishedServer(mirror) as server:
        opened = HttpSource(f"{server.url}/list.csv").open(3000, "")
        assert (opened.start, b"".join(opened.blocks)) == (0, b"a" * 3000)


@pytest.mark.parametrize("kind", ["http", "storage"])
def test_bytes_of_two_versions_are_never_mixed(tmp_path: Path, mirror: Path, kind: str) -> None:
    file = mirror / "list.csv"
    file.write_bytes(b"a" * 3000)
    with PublishedServer(mirror) as server:
        url = f"{server.url}/list.csv"
        source = HttpSource(url) if kind == "http" else StorageSource(str(file))
        with pytest.raises(KeyboardInterrupt):
            transfer.transfer(source, tmp_path / "file", _interrupt)
        (tmp_path / ".file.part").write_bytes(b"a" * 100)
        file.write_bytes(b"b" * 2000)
        transfer.transfer(source, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"b" * 2000


def test_a_source_that_brings_nothing_ends_with_one_line(tmp_path: Path, mirror: Path) -> None:
    with PublishedServer(mirror) as server:
        server.cut_after = 0
        with pytest.raises(StorageError, match=r"6 tries in a row brought nothing.*it continues"):
            transfer.transfer(HttpSource(f"{server.url}/AVE_features.zip"), tmp_path / "file")
        with pytest.raises(DataError, match=r"missing \(HTTP 404\)"):
            transfer.transfer(HttpSource(f"{server.url}/none"), tmp_path / "file")


def test_a_file_that_is_not_the_published_one_is_refused(tmp_path: Path, mirror: Path, ave: DataSet) -> None:
    (mirror / ave.lists[0].path).write_bytes(b"other")
    with pytest.raises(DataError, match="not the published file"):
        _get(ave, tmp_path / "ave", str(mirror))


def test_a_file_that_differs_from_the_recorded_one_is_refused(tmp_path: Path, mirror: Path, ave: DataSet) -> None:
    with PublishedServer(mirror) as server:
        _get(ave, tmp_path / "ave", server.url)
        shutil.rmtree(tmp_path / "ave/shards")
        (tmp_path / "ave/downloads/AVE_features.zip").write_bytes(b"changed")
        with pytest.raises(DataError, match="not the file that was downloaded first"):
            _get(ave, tmp_path / "ave", server.url)


def test_unpacked_features_of_another_archive_are_not_imported(tmp_path: Path, mirror: Path, ave: DataSet) -> None:
    archive, folder = mirror / "AVE_features.zip", tmp_path / "ave"
    _get(ave, folder, str(mirror), keep="all")
    times = [path.stat().st_mtime_ns for path in sorted((folder / "unpacked").glob("*.npy"))]
    unpack_features([archive], folder / "unpacked")
    assert [path.stat().st_mtime_ns for path in sorted((folder / "unpacked").glob("*.npy"))] == times
    _write_archive(mirror, seed=1)
    (folder / "downloads/downloads.json").unlink()  # as the error advises, to accept the new archive
    shutil.rmtree(folder / "shards")
    reports = [_get(ave, place, str(mirror), keep="all").report for place in (folder, tmp_path / "fresh")]
    hashes = [report.manifest.content_hash for report in reports if report is not None]
    assert hashes == hashes[1:] * 2


def test_a_full_disk_is_one_line_before_the_download(
    tmp_path: Path, mirror: Path, ave: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda folder: 10)
    with PublishedServer(mirror) as server:
        with pytest.raises(StorageError, match=r"kB are needed in all .*, 10 B are free; make room"):
            _get(ave, tmp_path / "ave", server.url)
        assert not [request for request in server.requests if request[0] == "GET"]


def test_parts_of_an_archive_are_read_as_one(tmp_path: Path, mirror: Path) -> None:
    data = (mirror / "AVE_features.zip").read_bytes()
    third = len(data) // 3
    parts = [tmp_path / f"features.zip.a{letter}" for letter in "abc"]
    for number, part in enumerate(parts):
        part.write_bytes(data[number * third : (number + 1) * third if number < 2 else None])
    features = unpack_features(parts, tmp_path / "unpacked")
    assert features.visual.read_bytes() == (tmp_path / "made/visual.npy").read_bytes()
    assert features.audio.read_bytes() == (tmp_path / "made/audio.npy").read_bytes()


def _link(archive: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("visual.npy")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(info, "/etc/passwd")


def _two(archive: zipfile.ZipFile) -> None:
    archive.writestr("a/visual.npy", b"1")
    archive.writestr("b/visual.npy", b"2")


ARCHIVES: dict[str, tuple[Callable[[zipfile.ZipFile], None], str]] = {
    "link": (_link, "is a link"),
    "two": (_two, "2 files of visual features"),
    "none": (lambda archive: archive.writestr("readme.txt", b""), "0 files of visual features"),
}


@pytest.mark.parametrize(("make", "fault"), ARCHIVES.values(), ids=ARCHIVES)
def test_other_archives_are_refused(tmp_path: Path, make: Callable[[zipfile.ZipFile], None], fault: str) -> None:
    path = tmp_path / "features.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("audio.npy", b"1")
        make(archive)
    with pytest.raises(DataError, match=fault):
        unpack_features([path], tmp_path / "unpacked")


@pytest.mark.parametrize("damage", [lambda data: data[:-50], lambda data: b"x" * 100, lambda data: b"PK" + data[400:]])
def test_a_damaged_archive_is_one_line(tmp_path: Path, mirror: Path, damage: Callable[[bytes], bytes]) -> None:
    path = mirror / "AVE_features.zip"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        unpack_features([path], tmp_path / "unpacked")
    assert len(str(caught.value).splitlines()) == 1


def test_a_member_never_leaves_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "features.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../visual.npy", b"v")
        archive.writestr("/audio.npy", b"a")
    features = unpack_features([path], tmp_path / "in/unpacked")
    assert features.visual == tmp_path / "in/unpacked/visual.npy"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["features.zip", "in"]


@pytest.mark.parametrize(
    ("url", "error"), [("http://user:word@host/x", ConfigError), ("http:///x", ConfigError), ("ftp://host", AvcilError)]
)
def test_urls_with_secrets_and_other_protocols_are_refused(
    tmp_path: Path, ave: DataSet, url: str, error: type[AvcilError]
) -> None:
    with pytest.raises(error) as caught:
        list_files(ave, tmp_path, url)
    assert "word" not in str(caught.value)


def test_a_redirect_from_https_to_http_is_not_followed(mirror: Path) -> None:
    from data_shards.downloads.http import _Redirects

    class Request:
        full_url = "https://host/file"

    with pytest.raises(StorageError, match="not followed"):
        _Redirects().redirect_request(Request(), None, 302, "", {}, "http://host/file")
    with pytest.raises(StorageError, match="not followed"):
        _Redirects().redirect_request(Request(), None, 302, "", {}, "file:///etc/passwd")


def test_an_error_of_a_busy_server_is_tried_again() -> None:
    import urllib.error

    from data_shards.downloads.http import _refusal

    assert isinstance(_refusal("u", urllib.error.HTTPError("u", 503, "busy", {}, None)), CutError)  # type: ignore[arg-type]
    assert isinstance(_refusal("u", urllib.error.HTTPError("u", 403, "no", {}, None)), StorageError)  # type: ignore[arg-type]


def test_the_command_lists_downloads_and_states_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mirror/data").mkdir(parents=True)
    (tmp_path / "mirror/data/vggsound.csv").write_text("id,0,beep,train\n")
    monkeypatch.chdir(tmp_path)
    with PublishedServer(tmp_path / "mirror") as server:
        words = ["data", "get", "vggsound-lists", "--from", server.url]
        listed = CliRunner().invoke(cli, [*words, "--dry-run"])
        assert "data/vggsound.csv  16 B  to download" in listed.output
        assert not (tmp_path / "runs").exists()
        done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "next: avcil shards build runs/vggsound/downloads/data/vggsound.csv runs/vggsound/clips" in done.output
    assert (tmp_path / "runs/vggsound/downloads/data/vggsound.csv").is_file()
