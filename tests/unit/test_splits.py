import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avcil_dist.errors import DataError
from data_shards.listings.pickled_dict import read_pickled_dict
from data_shards.listings.published_lists import CLASS_FILE, LABEL_FILE, NUMBER_FILE, matches, read_published_lists
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


def _program(path: Path, code: bytes) -> Path:
    """Write a pickle program as a `.npy` file of an object."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(b"\x80\x04" + code)
    return path


def _integer(value: int) -> bytes:
    data = value.to_bytes(16, "little")
    return b"\x8a\x10" + data


PRIME = (1 << 61) - 1  # Python's hashes of integers are remainders of it


@pytest.mark.parametrize(
    "code",
    [
        pytest.param(b"}N" + b"\x85" * 1_000_000 + b"Ns.", id="deep-tuple-as-key"),
        pytest.param(b"\x8f(N" + b"\x85" * 1_000_000 + b"\x90.", id="deep-tuple-in-set"),
        pytest.param(b"(N" + b"\x85" * 1_000_000 + b"\x91.", id="deep-tuple-in-frozenset"),
        pytest.param(b"}N" + b"2\x86" * 40 + b"Ns.", id="doubled-tuple-as-key"),
        pytest.param(
            b"}(" + b"".join(_integer(n * PRIME) + b"N" for n in range(60_000)) + b"u.", id="integers-of-one-hash"
        ),
        pytest.param(b"(" + b"".join(_integer(n * PRIME) + b"N" for n in range(60_000)) + b"d.", id="the-same-in-dict"),
        pytest.param(b"c_codecs\nencode\nX\x01\x00\x00\x00a]\x86R.", id="list-as-encoding"),
        pytest.param(b"C\xff.", id="cut-bytes"),
        pytest.param(b"\x8e" + (1 << 60).to_bytes(8, "little") + b"x.", id="claimed-bytes"),
        pytest.param(b"\x8d" + (1 << 35).to_bytes(8, "little") + b"x.", id="claimed-text"),
        pytest.param(b"\x95" + (1 << 40).to_bytes(8, "little") + b"N.", id="claimed-frame"),
        pytest.param(b"\x96" + (1 << 40).to_bytes(8, "little") + b"N.", id="claimed-buffer"),
        pytest.param(b"I" + b"9" * 2_000_000, id="endless-number"),
        pytest.param(b"N.", id="none"),
        pytest.param(b"}\x94" + b"h\x00\x85" * 3 + b".", id="tuple"),
        pytest.param(b"(lp0\n" + b"(lp1\ng0\nag0\nag0\na" * 3 + b".", id="list"),
        pytest.param(b"cnumpy.core.multiarray\nscalar\nN)\x86R.", id="scalar-of-nothing"),
        pytest.param(b"cnumpy.core.multiarray\n_reconstruct\n)R(NNNNNtb.", id="array-of-nothing"),
    ],
)
def test_a_pickle_that_costs_more_than_its_size_is_refused_at_once(tmp_path: Path, code: bytes) -> None:
    path = _program(tmp_path / "evil.npy", code)
    started = time.process_time()
    with pytest.raises(DataError, match=r"evil\.npy: ") as caught:
        read_pickled_dict(path)
    assert len(str(caught.value)) < 400
    assert time.process_time() - started < 5


def test_a_doubled_list_is_never_printed(tmp_path: Path) -> None:
    doubled = b"](NNe" + b"\x94" + b"".join(b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e\x94" for n in range(40))
    for name in (b"cnumpy\ndtype\n", b"c_codecs\nencode\nX\x01\x00\x00\x00a"):
        code = doubled + b"0" + name + b"h\x28" + (b"\x85R." if b"dtype" in name else b"\x86R.")
        with pytest.raises(DataError, match=r"evil\.npy: .* not admitted"):
            read_pickled_dict(_program(tmp_path / "evil.npy", code))


@pytest.mark.parametrize("form", ["labels-of-numbers", "nested-keys", "unknown-number", "numbers-of-text"])
def test_lists_of_another_form_are_refused_in_one_line(tmp_path: Path, form: str) -> None:
    numbers: dict[Any, Any] = {"dog": 0}
    labels: dict[str, Any] = {"train": {"a": "dog"}, "val": {}, "test": {}}
    clips: dict[str, Any] = {"train": {0: ["a"]}, "val": {}, "test": {}}
    if form == "labels-of-numbers":
        labels["train"] = {1: "dog"}
    elif form == "nested-keys":
        clips["train"] = {0: [["a"]]}
    elif form == "unknown-number":
        clips["train"] = {7: ["a"]}
    else:
        numbers = {"dog": "0"}
    for name, content in ((NUMBER_FILE, numbers), (LABEL_FILE, labels), (CLASS_FILE, clips)):
        save_pickled_dict(tmp_path / name, content)
    with pytest.raises(DataError, match=r"_dict\.npy: ") as caught:
        read_published_lists(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
