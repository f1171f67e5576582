"""Two builds into one folder: the second waits for the first, and finds its data set."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from avcil_dist.errors import StorageError
from data_shards.build import build_shards
from data_shards.output_lock import LOCK, sole_build
from tests.helpers.rendered import tiny_clip

BUILD = """
import sys
from pathlib import Path
from data_shards.build import build_shards
report = build_shards(Path(sys.argv[1]), sys.argv[2], clips_per_shard=1, min_seconds=0.5)
print(report.unchanged, report.manifest.content_hash)
"""


def _clips(folder: Path, count: int) -> Path:
    for number in range(count):
        path = folder / "train" / "dog" / f"{number}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_clip())
    return folder


def test_the_second_waits_says_so_and_leaves_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    order: list[str] = []

    def second() -> None:
        with sole_build(f"{tmp_path}/out"):
            order.append("second")

    with sole_build(f"{tmp_path}/out"):
        thread = threading.Thread(target=second)
        thread.start()
        while not caplog.records:
            thread.join(0.01)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/out: another process builds into this folder; waiting until it ends"
    ]
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/out: cannot be written"), sole_build(f"{tmp_path}/file/out"):
        pass
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / LOCK).symlink_to("/etc/hostname")
    with pytest.raises(StorageError, match="cannot be written"), sole_build(f"{tmp_path}/out"):
        pass


@pytest.mark.slow
def test_two_builds_at_once_give_one_data_set(tmp_path: Path) -> None:
    clips, output = _clips(tmp_path / "clips", 12), str(tmp_path / "out")
    command = [sys.executable, "-c", BUILD, str(clips), output]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    report = build_shards(clips, output, clips_per_shard=1, min_seconds=0.5)
    assert sorted(text for text, _ in outputs) == [
        f"False {report.manifest.content_hash}\n",
        f"True {report.manifest.content_hash}\n",
    ]
    assert not Path(output, LOCK).exists()
