"""Lock of a stream's submission: one at a time, from the look at live jobs to the record of the new ones.

A cancellation takes it too, from the look at live jobs to their end.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import Timeout

from avcil_dist import storage
from avcil_dist.errors import SchedulerError
from avcil_dist.system.trusted_files import make_private_folder

LOCK_SECONDS = 60


@contextmanager
def submission_lock(stream: str, folder: Path) -> Iterator[None]:
    """Lock against another submission or cancellation of the same stream, and make the folder of its chain.

    The lock file is not among the files that can be discarded. Raises SchedulerError when the other one does not end
    within a minute, ConfigError for a folder that others can write, StorageError where it takes no file.
    """
    path = storage.local_path(stream)
    file = Path(path).with_name(f".{Path(path).name}.submit.lock") if path else folder / "submit.lock"
    try:
        with storage.file_lock(file, LOCK_SECONDS) as lock:
            # sbatch inherits the lock: one that outlives a killed submission ends before another submission looks
            # for live jobs.
            descriptor = lock._context.lock_file_fd
            assert descriptor is not None
            os.set_inheritable(descriptor, True)
            with storage.writing(folder, storage.REFUSED):
                make_private_folder(folder)  # jobs run the code and load the pickles in it
                yield
    except Timeout:
        raise SchedulerError(
            f"{stream}: another submission or cancellation of this stream is under way; try again"
        ) from None
