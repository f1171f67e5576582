import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from avcil_dist import storage
from avcil_dist.errors import DataError
from data_shards.workers import MarkStart, map_in_workers
from tests.helpers.lethal import write_to_full_standard_error


def _double(item: list[int], crashed: frozenset[int], mark_start: MarkStart) -> list[int]:
    """Twice each element; 13 crashes the process as a broken decoder does, 99 as a system without memory, 21 writes."""
    doubled = []
    for position, element in enumerate(item):
        mark_start(position)
        if position in crashed:
            continue
        if element == 21:
            write_to_full_standard_error()
        if element in (13, 99):
            signal.raise_signal(signal.SIGSEGV if element == 13 else signal.SIGKILL)
        doubled.append(2 * element)
    return doubled


def _refuse(item: int, crashed: frozenset[int], mark_start: MarkStart) -> int:
    if item == 1:
        raise DataError("item 1 is wrong")
    return item


def _outlast(folder: Path, item: int, crashed: frozenset[int], mark_start: MarkStart) -> int:
    """Item 0 ends at once, item 1 when the worker of item 0 has ended."""
    mark_start(0)
    if item == 0:
        storage.write_bytes(str(folder / "worker"), str(os.getpid()).encode())
    else:
        _wait_for((folder / "worker").exists)
        _wait_for(lambda: not Path("/proc", (folder / "worker").read_text()).exists())
    return item


def _wait_for(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def _write(folder: Path, end: str, item: int, crashed: frozenset[int], mark_start: MarkStart) -> int:
    """Item 0 writes files until its process is stopped, or crashes; then item 1 raises an error."""
    mark_start(0)
    if item == 1:
        _wait_for((folder / "place").exists)
        if end == "stop":
            raise DataError("item 1 is wrong")
    elif not crashed:
        with storage.temporary_folder() as temporary, storage.new_file(str(folder / "out" / "shard.tar")) as file:
            (temporary / "file").write_bytes(bytes(9))
            file.write(bytes(9))
            storage.write_bytes(str(folder / "place"), str(temporary).encode())
            if end == "crash":
                signal.raise_signal(signal.SIGSEGV)
            _wait_for(lambda: False)
    return item


def _break(item: int, crashed: frozenset[int], mark_start: MarkStart) -> int:
    return item // 0


def _blocks_interrupts(item: int, crashed: frozenset[int], mark_start: MarkStart) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def _in_new_process(script: str, folder: Path) -> str:
    """Run a script in a session of its own, and so with a fork server of its own. Returns its output."""
    ended = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=folder,
        text=True,
        timeout=100,
        check=False,
        start_new_session=True,
    )
    return ended.stdout


@pytest.mark.slow
def test_workers_and_their_server_start_with_interrupts_blocked(tmp_path: Path) -> None:
    script = (
        "from data_shards.workers import map_in_workers\n"
        "from tests.unit.test_workers import _blocks_interrupts\n"
        "print(map_in_workers(_blocks_interrupts, [0], processes=1))\n"
    )
    assert _in_new_process(script, tmp_path) == "[True]\n"


@pytest.mark.slow
def test_an_interrupt_while_workers_render_is_that_of_the_command_alone(tmp_path: Path) -> None:
    script = (
        "import os, signal, threading\n"
        "from pathlib import Path\n"
        "from data_shards.synthetic import SyntheticSpec, render_dataset\n"
        "threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()\n"
        "try: render_dataset(Path('clips'), SyntheticSpec(), processes=2)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    assert _in_new_process(script, tmp_path) == "interrupted\n"


@pytest.mark.slow
def test_results_are_in_the_order_of_the_items() -> None:
    items = [[number] * (10 - number) for number in range(10)]
    expected = [[2 * element for element in item] for item in items]
    counts: list[int] = []
    assert map_in_workers(_double, items, processes=0, on_start=counts.append) == expected
    assert counts == list(range(1, 56))
    assert map_in_workers(_double, items, processes=2, on_start=counts.append) == expected


@pytest.mark.slow
def test_only_elements_that_crash_a_worker_are_left_out() -> None:
    items = [[1, 2], [3, 13, 7], [21], [13, 13, 13, 13, 4]]
    crashes: list[tuple[int, frozenset[int]]] = []
    results = map_in_workers(_double, items, processes=2, on_crash=lambda *crash: crashes.append(crash))
    assert results == [[2, 4], [6, 14], [42], [8]]
    assert dict(crashes) == {1: {1}, 3: {0, 1, 2, 3}}
    assert len(crashes) == 5


@pytest.mark.slow
def test_elements_that_crashed_a_worker_before_are_not_tried_again() -> None:
    crashes: list[int] = []
    known = {1: frozenset({1})}
    arguments = {"crashed": known, "on_crash": lambda number, _: crashes.append(number)}
    assert map_in_workers(_double, [[1], [3, 13, 5]], processes=1, **arguments) == [[2], [6, 10]]
    assert map_in_workers(_double, [[1], [3, 13, 5]], processes=0, **arguments) == [[2], [6, 10]]
    assert crashes == []


@pytest.mark.slow
def test_item_whose_workers_are_killed_ends_the_run() -> None:
    with pytest.raises(DataError, match=r"4 worker processes ended, the last with exit code -9; is memory short"):
        map_in_workers(_double, [[1], [5, 99]], processes=1)


@pytest.mark.slow
def test_error_in_a_worker_is_raised_in_the_parent() -> None:
    with pytest.raises(DataError, match="item 1 is wrong"):
        map_in_workers(_refuse, [0, 1, 2], processes=2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        map_in_workers(_break, [0], processes=1)


@pytest.mark.slow
def test_worker_ends_when_no_item_waits(tmp_path: Path) -> None:
    assert map_in_workers(partial(_outlast, tmp_path), [0, 1], processes=2) == [0, 1]


@pytest.mark.slow
def test_stop_leaves_no_temporary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="item 1 is wrong"):
        map_in_workers(partial(_write, tmp_path, "stop"), [0, 1], processes=2)
    assert not Path((tmp_path / "place").read_text()).exists()
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_crashed_worker_leaves_no_temporary_files(tmp_path: Path) -> None:
    assert map_in_workers(partial(_write, tmp_path, "crash"), [0, 1], processes=2) == [0, 1]
    assert not Path((tmp_path / "place").read_text()).exists()


def test_no_items_give_no_results() -> None:
    assert map_in_workers(_double, [], processes=2) == []
