import os
import signal
from collections.abc import Callable

import pytest

from avcil_dist.errors import DataError
from data_shards.workers import map_in_workers

ResumePolicy = Callable[[int], None]


def _double(item: list[int], lethal: frozenset[int], begin: ResumePolicy) -> list[int]:
    """Twice each element; 13 kills the process as a broken decoder would."""
    doubled = []
    for place, element in enumerate(item):
        begin(place)
        if place in lethal:
            continue
        if element == 13:
            os.kill(os.getpid(), signal.SIGSEGV)
        doubled.append(2 * element)
    return doubled


def _refuse(item: int, lethal: frozenset[int], begin: ResumePolicy) -> int:
    if item == 1:
        raise DataError("item 1 is wrong")
    return item


def _break(item: int, lethal: frozenset[int], begin: ResumePolicy) -> int:
    return item // 0


def test_results_come_in_the_order_of_the_items() -> None:
    items = [[number] * (10 - number) for number in range(10)]
    expected = [[2 * element for element in item] for item in items]
    counts: list[int] = []
    assert map_in_workers(_double, items, processes=0, begun=counts.append) == expected
    assert counts == list(range(1, 56))
    assert map_in_workers(_double, items, processes=2, begun=counts.append) == expected


def test_only_the_elements_that_kill_a_process_are_left_out() -> None:
    items = [[1, 2], [3, 13, 5, 13, 7], [8]]
    assert map_in_workers(_double, items, processes=2) == [[2, 4], [6, 10, 14], [16]]


def test_an_item_that_kills_every_process_ends_the_run() -> None:
    with pytest.raises(DataError, match=r"4 working processes died, the last with exit code -11; is memory short"):
        map_in_workers(_double, [[1], [13] * 9], processes=1)


def test_an_error_in_a_process_is_raised_here() -> None:
    with pytest.raises(DataError, match="item 1 is wrong"):
        map_in_workers(_refuse, [0, 1, 2], processes=2)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        map_in_workers(_break, [0], processes=1)


def test_nothing_to_do_is_done() -> None:
    assert map_in_workers(_double, [], processes=2) == []
