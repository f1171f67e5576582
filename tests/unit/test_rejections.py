"""The table of rejected clips as a file."""

import os
from pathlib import Path

import pytest

from avcil_dist.errors import DataError
from data_shards.rejections import Rejection, read_rejections, write_rejections

NAMES = [
    b"plain.mp4",
    b"caf\xe9.mp4",
    b"\xff\xfe",
    "狗\n,\"'.mp4".encode(),
    rb"a\xe9.mp4",
    rb"\\",
    b"\\\xe9",
    rb"\udce9",
]


def test_every_name_that_a_file_can_have_comes_back(tmp_path: Path) -> None:
    url = f"{tmp_path}/rejected.csv"
    rejected = tuple(
        Rejection(f"/v/{os.fsdecode(name)}", "狗 dog", "train", "corrupt", f"{os.fsdecode(name)}: damaged")
        for name in NAMES
    )
    write_rejections(url, rejected)
    assert read_rejections(url) == rejected
    assert r"/v/caf\xe9.mp4" in Path(url).read_text(encoding="utf-8")  # any program can read the table


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b'path,label,split,kind,reason\n"',
        b"path,label,split,kind,reason\na,b,c,d,e\n",
        b"path,label,split,kind,reason\na,b\n",
        b"path\n1\n",
        b"path,label,split,kind,reason\n" + b"a" * 200_000 + b",b,train,crash,e\n",
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rejected.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"rejected\.csv: not a table of rejected clips \(") as caught:
        read_rejections(str(path))
    assert len(str(caught.value).splitlines()) == 1
