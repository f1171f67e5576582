"""Digests of large input files, so that an output is never taken for one of other inputs.

A digest is the sha256 of a file's whole content. It is saved in the output with the file's stamp (device, inode,
size, times of change) and reused while the stamp is the same, so a second run reads small stamps, not large files.
"""

import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from avcil_dist import storage
from avcil_dist.errors import DataError
from data_shards.workers import Progress

DIGESTS = "inputs.json"
READ_BYTES = 1 << 24
# a file that was changed just before it is read may change again within one tick of its file system's clock
SETTLED_NS = 2_000_000_000


def input_digests(paths: Sequence[Path], output: str, progress: Progress | None = None) -> list[str]:
    """The sha256 of each file, from `output` for files unchanged since an earlier run.

    `progress` is called with the number of MiB read and their total. Raises DataError for a missing file.
    """
    url = storage.join(output, DIGESTS)
    saved = storage.read_json(url, dict[str, str], "digests of input files") if storage.exists(url) else {}
    stamps = [_stamp(path) for path in paths]
    digests: list[str | None] = [saved.get(stamp) for stamp in stamps]
    unread = [path for path, digest in zip(paths, digests, strict=True) if digest is None]
    total, done = sum(path.stat().st_size for path in unread), 0
    settled = {}
    for number, path in enumerate(paths):
        if digests[number] is None:
            is_settled = time.time_ns() - path.stat().st_ctime_ns > SETTLED_NS
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while data := file.read(READ_BYTES):
                    digest.update(data)
                    done += len(data)
                    if progress:
                        progress(done >> 20, total >> 20)
            digests[number] = digest.hexdigest()
            if is_settled:
                settled[stamps[number]] = digests[number]
    if settled:
        storage.write_json(url, {stamp: saved[stamp] for stamp in stamps if stamp in saved} | settled)
    return [digest for digest in digests if digest is not None]


def _stamp(path: Path) -> str:
    """A text that changes with the file: no program can set the time of the last status change."""
    if not path.is_file():
        raise DataError(f"{path}: missing")
    status = path.stat()
    values = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "-".join(map(str, values))
