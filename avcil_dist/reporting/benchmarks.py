"""Benchmarks of a comparison: the streams of one name that learn the same task on the same data.

The task is the classes, their steps, and the settings of data and scenario that make results incomparable, all but the
seed of the class order. Model and method are what is compared. Streams of one name that differ in the task are of
different benchmarks, named after the settings that differ.
"""

from collections.abc import Iterable, Sequence

from avcil_dist.config.compat import MANIFEST_HASH, change_class
from avcil_dist.config.section import ChangeClass
from avcil_dist.config.serialization import flatten
from avcil_dist.config.variant_names import ORDER, benchmark_name
from avcil_dist.reporting.report import StreamReport

COMPARED = ("method.", "model.")
MAX_SHOWN = 24  # characters of a value in the name of a benchmark
HASH_CHARACTERS = 8

Task = dict[str, str]


def _is_of_task(key: str) -> bool:
    """Whether a setting is a part of the task."""
    return change_class(key) is ChangeClass.INCOMPARABLE and key != ORDER and not key.startswith(COMPARED)


def benchmarks(streams: Sequence[StreamReport]) -> list[str]:
    """Return the benchmark of each stream: its name, and in brackets what differs from others of that name."""
    found = [""] * len(streams)
    for name, numbers in _by_name(streams).items():
        tasks = _tasks([streams[number] for number in numbers])
        keys = _differing(tasks)
        distinct = [task for place, task in enumerate(tasks) if task not in tasks[:place]]
        words = [", ".join(_word(key, task[key]) for key in keys) for task in distinct]
        if len(set(words)) < len(words):  # long values with the same beginning
            words = [f"{place}: {word}" for place, word in enumerate(words, start=1)]
        for number, task in zip(numbers, tasks, strict=True):
            found[number] = f"{name} ({words[distinct.index(task)]})" if keys else name
    return found


def benchmark_notes(streams: Sequence[StreamReport]) -> list[str]:
    """Return a line for each name that has several benchmarks, or data that differ by seed."""
    notes = []
    for name, numbers in _by_name(streams).items():
        own = [streams[number] for number in numbers]
        if keys := _differing(_tasks(own)):
            notes.append(f"{name}: streams that differ in {', '.join(keys)} are not compared with one another")
        elif len({stream.manifest_hash for stream in own}) > 1:
            notes.append(f"{name}: the data ({MANIFEST_HASH}) differ from seed to seed")
    return notes


def _by_name(streams: Iterable[StreamReport]) -> dict[str, list[int]]:
    names: dict[str, list[int]] = {}
    for number, stream in enumerate(streams):
        names.setdefault(benchmark_name(stream.config), []).append(number)
    return names


def _tasks(streams: Sequence[StreamReport]) -> list[Task]:
    """The task of each of the streams of one name.

    The data are a part of it, unless each seed has data of its own, with the same classes, which all rows share.
    """
    tasks = [
        {key: _text(value) for key, value in flatten(stream.config).items() if _is_of_task(key)} for stream in streams
    ]
    by_seed = {(stream.config.seed, stream.manifest_hash) for stream in streams}
    if len({seed for seed, _ in by_seed}) < len(by_seed) or len({_classes(stream) for stream in streams}) > 1:
        for task, stream in zip(tasks, streams, strict=True):
            task[MANIFEST_HASH] = stream.manifest_hash[:HASH_CHARACTERS]
    return tasks


def _classes(stream: StreamReport) -> frozenset[str]:
    return frozenset(stream.scenario.classes)


def _differing(tasks: Sequence[Task]) -> list[str]:
    """The parts of tasks, which all have the same ones, that are not the same in all."""
    return [key for key in tasks[0] if len({task[key] for task in tasks}) > 1]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _word(key: str, value: str) -> str:
    shown = value if len(value) <= MAX_SHOWN else f"{value[: MAX_SHOWN - 1]}…"
    return f"{key.removeprefix('scenario.').removeprefix('data.')}={shown}"
