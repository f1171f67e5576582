"""Files of predictions, read back, and the comparison of two of them clip by clip."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest

from avcil_dist.errors import DataError
from avcil_dist.inference.paired import outcomes_of_file, paired
from avcil_dist.inference.predictions_file import PredictionTable, read_labels, write_predictions

KEYS, LABELS = ["v1_0", "v1_1", "v2_0", "ü,\n_0"], ["cat", "dog", "cat", "dog"]
SCORES = np.array([[2, 1], [3, 0], [np.nan, np.nan], [0, 1]], dtype=np.float32)  # right, wrong, damaged, right


def write(path: Path, scores: np.ndarray, order: list[int], labels: list[str] | None = LABELS) -> str:
    chosen = None if labels is None else [labels[row] for row in order]
    write_predictions(str(path), PredictionTable([KEYS[row] for row in order], chosen, ["cat", "dog"], scores[order]))
    return str(path)


@pytest.mark.parametrize("ending", [".csv", ".npz"])
def test_a_file_of_predictions_is_read_as_it_was_written(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", SCORES, [0, 1, 2, 3])
    assert read_labels(path) == (KEYS, LABELS, ["cat", "cat", "", "dog"])
    empty = str(tmp_path / f"empty{ending}")
    write_predictions(empty, PredictionTable([], [], ["cat", "dog"], SCORES[:0]))
    assert read_labels(empty) == ([], [], [])


def test_two_files_are_compared_clip_by_clip_in_whatever_order(tmp_path: Path) -> None:
    first = outcomes_of_file(write(tmp_path / "a.csv", SCORES, [0, 1, 2, 3]))
    better = np.array([[2, 1], [0, 3], [1, 2], [0, 1]], dtype=np.float32)
    second = outcomes_of_file(write(tmp_path / "b.npz", better, [3, 1, 0, 2]))
    found = paired(first, second)
    assert found["first"] == {"predictions": str(tmp_path / "a.csv"), "seen_accuracy": 0.5}
    assert (found["difference"], found["only_first"], found["only_second"]) == (-0.25, 0, 1)
    assert (found["num_clips"], found["num_sources"]) == (4, 3)


def test_clips_that_differ_or_are_there_twice_are_refused_by_name(tmp_path: Path) -> None:
    whole = outcomes_of_file(write(tmp_path / "a.csv", SCORES, [0, 1, 2, 3]))
    part = outcomes_of_file(write(tmp_path / "b.csv", SCORES, [0, 1, 3]))
    with pytest.raises(DataError, match="1 clips are in one of them only, such as v2_0 of cat"):
        paired(whole, part)
    twice = outcomes_of_file(write(tmp_path / "c.csv", SCORES, [0, 0]))
    with pytest.raises(DataError, match=r"c\.csv: a clip is there twice"):
        paired(twice, twice)
    none = outcomes_of_file(write(tmp_path / "d.csv", SCORES, []))
    with pytest.raises(DataError, match=r"d\.csv: has no clips"):
        paired(none, none)


@pytest.mark.parametrize("ending", [".csv", ".npz"])
def test_a_file_without_labels_or_damaged_is_one_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    write(path, SCORES, [0, 1], labels=None)
    with pytest.raises(DataError, match="has no label of its clips; `avcil eval STREAM --predictions FILE` writes"):
        read_labels(str(path))
    path.write_bytes(b"PK\x03\x04\xff\xfe\x00")
    with pytest.raises(DataError, match=f"a{ending}: .*predictions"):
        read_labels(str(path))


def archive(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, values in arrays.items():
            member = io.BytesIO()
            np.save(member, values, allow_pickle=True)
            file.writestr(f"{name}.npy", member.getvalue())
    return buffer.getvalue()


def test_nothing_of_a_file_of_predictions_is_unpickled(tmp_path: Path) -> None:
    words = np.array(["a", "b"])
    path = tmp_path / "a.npz"
    for wrong in (np.array([{}, 1], dtype=object), np.array([1, 2]), np.array([["a"], ["b"]])):
        path.write_bytes(archive(key=wrong, label=words, prediction=words))
        with pytest.raises(DataError, match=r"a\.npz: key"):
            read_labels(str(path))
    path.write_bytes(archive(key=words, label=words, prediction=words[:1]))
    with pytest.raises(DataError, match="2, 1 clips"):
        read_labels(str(path))
