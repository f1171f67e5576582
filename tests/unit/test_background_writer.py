"""Commits in the background: training goes on while files are written, and the errors of a write reach it."""

import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch

from avcil_dist import storage
from avcil_dist.errors import StorageError
from avcil_dist.streams.commit import FileDigests
from avcil_dist.streams.tensors import TYPES, write_tensors
from avcil_dist.training.background_writer import BackgroundWriter

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("one_rank")]

DIGESTS: FileDigests = {"a": {"size": 1, "sha256": "0"}}


@pytest.fixture
def writer() -> BackgroundWriter:
    return BackgroundWriter(lambda value: [value])


def test_training_goes_on_while_files_are_written_and_the_commit_follows(writer: BackgroundWriter) -> None:
    may_write, may_commit, committed = threading.Event(), threading.Event(), list[FileDigests]()

    def write() -> FileDigests:
        may_write.wait(30)
        return DIGESTS

    def commit(digests: FileDigests) -> None:
        may_commit.wait(30)
        committed.append(digests)

    writer.begin(write, commit)
    assert writer.is_busy
    assert not committed
    may_write.set()
    writer._files.exception()  # type: ignore[union-attr] - waits
    assert not writer.is_busy
    writer.advance()
    assert writer.is_busy
    assert not committed
    may_commit.set()
    writer.finish()
    assert committed == [DIGESTS]
    assert not writer.is_busy
    writer.close()


@pytest.mark.parametrize("place", ["write", "commit"])
def test_the_error_of_a_write_reaches_the_training_and_the_next_write_works(
    writer: BackgroundWriter, place: str
) -> None:
    committed: list[FileDigests] = []

    def fail(*_: FileDigests) -> FileDigests:
        raise StorageError("/x: cannot be written (No space left on device); make room")

    writer.begin(fail if place == "write" else lambda: DIGESTS, fail if place == "commit" else committed.append)
    with pytest.raises(StorageError, match="No space left on device"):
        writer.finish()
    assert not committed
    writer.begin(lambda: DIGESTS, committed.append)
    writer.finish()
    assert committed == [DIGESTS]
    writer.close()


def test_a_write_that_was_closed_is_not_committed(writer: BackgroundWriter) -> None:
    committed: list[FileDigests] = []
    writer.begin(lambda: DIGESTS, committed.append)
    writer.close()
    writer.finish()
    assert not committed


def test_tensors_are_written_as_the_library_reads_them_with_the_digest_of_the_file(tmp_path: Path) -> None:
    tensors = {f"{dtype}/0": torch.arange(5).to(dtype) for dtype in TYPES} | {"none": torch.zeros(0)}
    url = str(tmp_path / "x.safetensors")
    digest = write_tensors(url, tensors)
    data = Path(url).read_bytes()
    assert digest == {"size": len(data), "sha256": storage.sha256(data)}
    for found in (safetensors.torch.load(data), safetensors.torch.load_file(url)):
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], value) for name, value in tensors.items())
        assert all(found[name].dtype == value.dtype for name, value in tensors.items())
