import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcil_dist.errors import DataError
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.published_lists import matches, read_published_lists
from tests.helpers.data import needs_published, published
from tests.helpers.published_forms import MADE_BENCHMARKS, make_benchmark, save_pickled_dict, write_split_lists

LABELS = {"train": {"a": "dog", "b": "cat"}, "val": {"c": "cat"}, "test": {"d": "dog"}}


def test_lists_are_read_in_the_order_of_the_class_numbers(tmp_path: Path) -> None:
    lists = read_published_lists(write_split_lists(tmp_path, LABELS, {"dog": 1, "cat": 0}))
    assert matches(tmp_path)
    assert lists.classes == ("cat", "dog")
    assert lists.labels == LABELS


@pytest.mark.parametrize("name", MADE_BENCHMARKS)
def test_lists_in_the_published_form_are_read(tmp_path: Path, name: str) -> None:
    lists = read_published_lists(make_benchmark(tmp_path, name))
    assert lists.classes[0] == "Male speech, man speaking"
    assert tuple(len(labels) for labels in lists.labels.values()) == MADE_BENCHMARKS[name].counts


@needs_published("official_splits")
@pytest.mark.parametrize(
    ("name", "first", "counts"),
    [
        ("AVE", "Acoustic guitar", (3294, 391, 394)),
        ("kinetics-sounds", "playing drums", (19220, 1947, 1958)),
        ("VGGSound_100", "playing theremin", (51195, 5000, 5000)),
    ],
)
def test_published_lists_have_their_published_counts(name: str, first: str, counts: tuple[int, ...]) -> None:
    lists = read_published_lists(published("official_splits") / name)
    assert lists.classes[0] == first
    assert tuple(len(found) for found in lists.labels.values()) == counts
    if name == "VGGSound_100":
        train = {key.rpartition("_")[0] for key in lists.labels["train"]}
        disjoint = [key for key in lists.labels["test"] if key.rpartition("_")[0] not in train]
        assert len(disjoint) == 3373


def test_lists_that_do_not_agree_are_refused(tmp_path: Path) -> None:
    write_split_lists(tmp_path, LABELS, {"dog": 1, "cat": 0})
    save_pickled_dict(tmp_path / "all_id_category_dict.npy", LABELS | {"val": {"c": "dog"}})
    with pytest.raises(DataError, match="do not agree on the val clips"):
        read_published_lists(tmp_path)
    save_pickled_dict(tmp_path / "category_encode_dict.npy", {"dog": 3, "cat": 0})
    with pytest.raises(DataError, match="not numbered"):
        read_published_lists(tmp_path)


def test_plain_values_and_numpy_scalars_are_read(tmp_path: Path) -> None:
    content = {"a": [1, 2.5, None, True], 3: {"x", "y"}, "n": np.int64(7), "f": np.float32(0.5), "t": (1, "é" * 300)}
    for version in (2, 3, 4, 5):
        with (tmp_path / "d.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
            pickle.dump(np.array(content, dtype=object), file, protocol=version)
        read = read_pickled_dict(tmp_path / "d.npy")
        assert read == content
        assert type(read["n"]) is int


class _RunsAShell:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


class _Evaluates:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1 + 1",)


class _LoadsNumpy:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.load, ("x.npy",)


def test_malicious_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    path = save_pickled_dict(tmp_path / "evil.npy", {"train": _RunsAShell(target)})
    with pytest.raises(
        DataError, match=r"evil\.npy: cannot be read .* names (posix|nt)\.system, which is not admitted"
    ):
        read_pickled_dict(path)
    assert not target.exists()
    assert np.load(path, allow_pickle=True) is not None  # the pickle does what it says, given to another reader
    assert target.exists()


@pytest.mark.parametrize("evil", [_Evaluates(), _LoadsNumpy(), Path("x"), np.dtype("datetime64[s]"), np.zeros(3)])
def test_names_that_are_not_admitted_are_refused(tmp_path: Path, evil: Any) -> None:
    with pytest.raises(DataError, match="admitted"):
        read_pickled_dict(save_pickled_dict(tmp_path / "evil.npy", {"x": evil}))


def test_pickle_cannot_change_an_admitted_name(tmp_path: Path) -> None:
    # BUILD would set attributes of what is on the stack: here of the name numpy.dtype, to be another callable
    program = b"\x80\x03cnumpy\ndtype\nN}X\x05\x00\x00\x00_makecbuiltins\nset\ns\x86b."
    with (tmp_path / "evil.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(program)
    with pytest.raises(DataError, match="must not change"):
        read_pickled_dict(tmp_path / "evil.npy")


@pytest.mark.parametrize("fault", ["cut", "no npy", "numbers", "list", "missing"])
def test_broken_file_is_one_clear_error(tmp_path: Path, fault: str) -> None:
    path = save_pickled_dict(tmp_path / "d.npy", {"a": "b" * 1000})
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "no npy":
        path.write_bytes(b"hello")
    elif fault == "numbers":
        np.save(path, np.zeros(3))
    elif fault == "list":
        save_pickled_dict(path, ["a", "b"])
    else:
        path.unlink()
    with pytest.raises(DataError, match=r"d\.npy: ") as raised:
        read_pickled_dict(path)
    assert "\n" not in str(raised.value)
