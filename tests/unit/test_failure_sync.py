"""Failures of ranks, here threads: tracebacks that no other failure hides, and messages that wait for no cleanup."""

import datetime
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from torch._C._distributed_c10d import TCPStore

from avcil_dist.errors import AvcilError, DataError, RankError
from avcil_dist.training import failure_sync
from avcil_dist.training.failure_sync import propagate_failures, publishing_failures
from avcil_dist.world import World

pytestmark = pytest.mark.fast

SECONDS = datetime.timedelta(seconds=30)
Rank = Callable[[int], None]


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The exit codes of processes that are ended, here only noted."""
    codes: list[int] = []
    monkeypatch.setattr(failure_sync.os, "_exit", codes.append)
    return codes


def errors_of(run: Rank, report: Callable[[AvcilError], None] = lambda error: None) -> list[Exception | None]:
    """Run two ranks, each in the block that propagates failures; returns what each raises."""
    first = TCPStore("127.0.0.1", 0, None, True, SECONDS, wait_for_workers=False)
    stores = [first, TCPStore("127.0.0.1", first.port, None, False, SECONDS, wait_for_workers=False)]

    def rank(number: int) -> Exception | None:
        try:
            with propagate_failures(stores[number], World(number, 2, number, 2), report):
                run(number)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


def test_a_bug_of_all_ranks_at_once_has_the_traceback_of_each_in_the_log_and_waits_for_nothing(
    ended: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    begun = threading.Barrier(2)

    def run(rank: int) -> None:
        begun.wait()
        raise TypeError(f"a bug seen on rank {rank}")

    started = time.monotonic()
    errors = errors_of(run)
    assert time.monotonic() - started < failure_sync.GRACE_SECONDS
    assert {type(error) for error in errors} == {TypeError, RankError}
    assert not ended
    for rank in range(2):
        [record] = [record for record in caplog.records if record.getMessage() == f"rank {rank} failed:"]
        assert f"a bug seen on rank {rank}" in logging.Formatter().formatException(record.exc_info)


@pytest.mark.parametrize("kind", [DataError, ZeroDivisionError])
def test_an_error_reaches_the_others_before_its_rank_has_cleaned_up(
    ended: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[Exception]
) -> None:
    monkeypatch.setattr(failure_sync, "GRACE_SECONDS", 0.5)
    reported, messages, cleaned = threading.Event(), list[str](), list[bool]()

    def report(error: AvcilError) -> None:
        messages.append(str(error))
        reported.set()

    @contextmanager
    def long_cleanup() -> Iterator[None]:
        try:
            yield
        finally:
            cleaned.append(reported.wait(10))

    def run(rank: int) -> None:
        if rank == 0:  # in a collective
            reported.wait(20)
            return
        with long_cleanup(), publishing_failures():
            raise kind("clip x")

    errors = errors_of(run, report)
    assert cleaned == [True]
    assert [type(error) for error in errors] == [type(None), kind]
    assert len(messages) == len(ended) == 1  # rank 0, which does not leave its collective
    assert "clip x" in messages[0]
    assert len([record for record in caplog.records if record.exc_info]) == (kind is ZeroDivisionError)


def test_a_consequence_of_another_error_has_no_traceback(ended: list[int], caplog: pytest.LogCaptureFixture) -> None:
    left = threading.Event()

    def run(rank: int) -> None:
        if rank == 0:
            try:
                with publishing_failures():
                    raise DataError("clip x")
            finally:
                left.set()
        left.wait(20)
        raise RuntimeError("Connection closed by peer")

    assert [(type(error), str(error)) for error in errors_of(run)] == [(DataError, "clip x")] * 2
    assert not ended
    assert not [record for record in caplog.records if record.exc_info]
