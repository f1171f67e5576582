"""Made data in the forms that benchmarks are published in, with what makes the published files awkward.

Video ids begin with a hyphen or an underscore, class names hold commas, brackets and a cut word, classes are
numbered in no alphabetical order, and two clips of one video lie in two splits or two classes.
"""

import csv
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_shards.listings.published_lists import PUBLISHED_FILES

SPLIT_NAMES = ("train", "val", "test")
CLASS_NAMES = (
    "Male speech, man speaking",
    "Frying (food)",
    "subway, metr",
    "Fixed-wing aircraft, airplane",
    "donkey, ass braying",
    "playing violin, fiddle",
    "Bark",
)
ALPHABET = "-_0aZ"


class Benchmark(NamedTuple):
    """Made split lists: clips per split, the form of a key, and the name of a key's file."""

    counts: tuple[int, int, int]
    key: str
    file: str


MADE_BENCHMARKS = {
    "AVE": Benchmark((70, 14, 7), "{video}", "{key}.mp4"),
    "kinetics-sounds": Benchmark((28, 7, 21), "{video}", "{key}_000010_000020.mp4"),
    "VGGSound_100": Benchmark((35, 7, 14), "{video}_{second:06d}", "{key}.mp4"),
}


def video_id(number: int) -> str:
    """Return an id of eleven characters, as YouTube's are; half of them begin with a hyphen or an underscore."""
    digits = [ALPHABET[number // 5**place % 5] for place in range(4)]
    return f"{''.join(digits)}{number:07d}"


def save_pickled_dict(path: Path, content: Any) -> Path:
    """Save as NumPy does today: a pickled object array without dimensions."""
    np.save(path, np.array(content, dtype=object), allow_pickle=True)
    return path


def save_published_dict(path: Path, content: Any) -> Path:
    """Save as the published files were: pickle protocol 3 and the module names of NumPy 1."""
    data = pickle.dumps(np.array(content, dtype=object), protocol=3)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
        file.write(data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))
    return path


def write_split_lists(folder: Path, labels: Mapping[str, Mapping[str, str]], numbers: Mapping[str, int]) -> Path:
    """Write the three files of a benchmark's split lists: class by clip and split, and each class's number."""
    folder.mkdir(parents=True, exist_ok=True)
    clips: dict[str, dict[int, list[str]]] = {split: {} for split in labels}
    for split, label_of in labels.items():
        for key, label in label_of.items():
            clips[split].setdefault(numbers[label], []).append(key)
    for name, content in zip(PUBLISHED_FILES, (clips, labels, numbers), strict=True):
        save_published_dict(folder / name, content)
    return folder


def make_benchmark(folder: Path, name: str) -> Path:
    """Write made split lists in the form of the benchmark `name`, with the counts of `MADE_BENCHMARKS`."""
    benchmark = MADE_BENCHMARKS[name]
    labels: dict[str, dict[str, str]] = {}
    for part, (split, count) in enumerate(zip(SPLIT_NAMES, benchmark.counts, strict=True)):
        # VGGSound's keys hold the second, so a video may lie in several splits
        first = 0 if "second" in benchmark.key else 1000 * part
        keys = [benchmark.key.format(video=video_id(first + i), second=30 * part + i) for i in range(count)]
        labels[split] = {key: CLASS_NAMES[i % len(CLASS_NAMES)] for i, key in enumerate(keys)}
    return write_split_lists(folder, labels, {label: number for number, label in enumerate(CLASS_NAMES)})


def write_vggsound(folder: Path, test: list[list[str]], train_counts: Mapping[str, int]) -> None:
    """Write `vggsound.csv`, `train.csv` and `test.csv`: the given test rows (file, label), and made train clips."""
    train = [
        [f"v{number:06d}-{i:04d}_{10 * i:06d}.mp4", label]
        for number, label in enumerate(train_counts)
        for i in range(train_counts[label])
    ]
    for name, rows in (("test.csv", test), ("train.csv", train)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    with (folder / "vggsound.csv").open("w", newline="") as file:
        for split, rows in (("train", train), ("test", test)):
            csv.writer(file).writerows(
                [name[: -len("_000000.mp4")], int(name[-10:-4]), label, split] for name, label in rows
            )


def vggsound_test_rows(per_class: int) -> list[list[str]]:
    """Return made rows (file, label) of VGGSound's `test.csv`; a video has clips in several classes."""
    return [
        [f"{video_id(i)}_{30 * number:06d}.mp4", label]
        for number, label in enumerate(CLASS_NAMES)
        for i in range(per_class)
    ]
