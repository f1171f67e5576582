"""Text files of users: csv, lists of classes, numbers. Each fault is one line with file and line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from avcil_dist.errors import DataError
from data_shards.listings.listing import read_class_names
from data_shards.listings.read import read_listing
from data_shards.listings.text_files import open_csv, parse_seconds

HEAD = "path,label,split,start\n"
NOBODY = 65534


@contextmanager
def without_rights() -> Iterator[None]:
    """Run the block as a user who may not read what is closed to others."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + 'a.mp4,"dog,train,0\nb.mp4,cat,train,0\n', "line 2: not a row of a csv"),
        (HEAD + 'a.mp4,dog,train,0\nb.mp4,cat,train,"0', "line 3: not a row of a csv"),
        (HEAD + "a\0.mp4,dog,train,0\n", "line 2: has a NUL"),
        (HEAD + "a.mp4,dog,train," + "9" * 400, "is not a number of seconds"),
        (HEAD + "a.mp4,dog,train,²\n", "is not a number of seconds"),
        (HEAD + "a.mp4,dog,train,٣\n", "is not a number of seconds"),
        (HEAD + "a.mp4,dog,train,10000000000000\n", "is not a number of seconds from 0 to 10000000"),
        (HEAD + "a.mp4,dog,train,-1\n", "is not a number of seconds"),
        (HEAD + "a.mp4,dog,train,1e5\n", "is not a number of seconds"),
        (HEAD + "a.mp4,dog,train,nan\n", "is not a number of seconds"),
        (HEAD + "a" * 140_000 + ",dog,train,0\n", "line 2: not a row of a csv (field larger"),
        (HEAD + "x" * 3_000_000, "line 2: longer than"),
        (HEAD + 'a.mp4,"d\x1b[2Jog",train,0\n', "has control characters"),
        (HEAD + 'a.mp4,"d\nog",train,0\n', "has control characters"),
        (HEAD + f"a.mp4,{'d' * 2000},train,0\n", "is too long"),
        ("x" * 100_000, "its header is 'xxx"),
        ("id,²,dog,train\n", "its header is 'id,²,dog,train'"),
    ],
)
def test_a_faulty_csv_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "clips.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_listing(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_quotes_that_are_closed_on_another_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeffa,"b\r\nc",d\r\n"x ""y""",z,é\n'.encode())
    with open_csv(path) as rows:
        assert list(rows) == [(2, ["a", "b\r\nc", "d"]), (3, ['x "y"', "z", "é"])]


def test_seconds_have_any_usual_form() -> None:
    assert [parse_seconds(text, "x") for text in ("0", "12", "3.", "3.25", " 7 ", "007", "10000000")] == [
        *(0.0, 12.0, 3.0, 3.25, 7.0, 7.0, 10_000_000.0)
    ]


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"dog\ncaf\xe9\n", "line 2 is not UTF-8"), (b"dog\n\0\n", "line 2: has a NUL"), (b"d\x1bog\n", "line 1: class ")],
)
def test_a_list_of_classes_is_read_the_same_way(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        read_class_names(path)


def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError) as caught:
            read_class_names(path)
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(DataError, match="cannot be read"):
        read_listing(tmp_path / ("x" * 300))


def test_a_file_and_a_folder_without_permission_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "clips.csv").write_text(HEAD + "a.mp4,dog,train,0\n")
    (tmp_path / "folder" / "dog").mkdir(parents=True)
    for path in (tmp_path / "clips.csv", tmp_path / "folder"):
        path.chmod(0)
        with without_rights(), pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
            read_listing(path)
        path.chmod(0o700)
