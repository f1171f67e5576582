"""Commits of folders in the background, while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from avcil_dist.errors import AvcilError
from avcil_dist.streams.commit import FileDigests
from avcil_dist.training.error_codec import decode_error, encode_error

Gather = Callable[[Any], list[Any]]


class BackgroundWriter:
    """Writer of folders whose files come from all ranks, one folder at a time. All ranks call it together.

    Each rank writes its files in a thread. When all have, rank 0 commits, in its thread. The calling thread exchanges
    only digests, by `gather`, which returns the values of all ranks; it waits for no storage, except in `finish`.
    """

    def __init__(self, gather: Gather) -> None:
        self._gather = gather
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._files: Future[FileDigests] | None = None
        self._commit: Future[None] | None = None
        self._begin_commit: Callable[[FileDigests], None] = lambda digests: None

    @property
    def is_busy(self) -> bool:
        """Whether this rank is writing or committing."""
        return any(future is not None and not future.done() for future in (self._files, self._commit))

    def begin(self, write: Callable[[], FileDigests], commit: Callable[[FileDigests], None]) -> None:
        """Call `write` on each rank, then `commit` on rank 0 with the digests of all ranks' files.

        Waits for an earlier folder. Raises its errors, as `advance` does.
        """
        self.finish()
        self._files, self._begin_commit = self._pool.submit(write), commit

    def advance(self) -> None:
        """Begin the commit when all files are written, or end it. No rank may be busy.

        Raises the AvcilError of any rank's write or commit, on all ranks; what was committed before stays.
        """
        if self._files is not None:
            files, self._files = self._files, None
            digests = self._exchange(files)
            merged = {name: digest for part in digests for name, digest in part.items()}
            self._commit = self._pool.submit(self._begin_commit if dist.get_rank() == 0 else _nothing, merged)
        elif self._commit is not None:
            commit, self._commit = self._commit, None
            self._exchange(commit)

    def finish(self) -> None:
        """Wait until the folder is committed. Raises as `advance` does."""
        while (future := self._files or self._commit) is not None:
            future.exception()  # waits
            self.advance()

    def close(self) -> None:
        """Wait for a write under way, whose folder is not committed any more."""
        self._files = self._commit = None
        self._pool.shutdown(cancel_futures=True)

    def _exchange(self, future: Future[Any]) -> list[Any]:
        """Return the results of all ranks. Raises the first AvcilError of any."""
        result, fault = None, None
        try:
            result = future.result()
        except AvcilError as error:
            fault = encode_error(error, dist.get_rank())
        results: list[tuple[Any, str | None]] = self._gather((result, fault))
        if faults := [text for _, text in results if text is not None]:
            raise decode_error(faults[0])
        return [value for value, _ in results]


def _nothing(digests: FileDigests) -> None:
    """Commit nothing: rank 0 does."""
