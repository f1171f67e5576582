"""Folder of multiprocessing's sockets, whose addresses must be short: a cluster's TMPDIR often is not."""

import atexit
import multiprocessing.process
import os
import shutil
import tempfile

from avcil_dist.errors import WorldError

MAX_ADDRESS = 107  # bytes, of the address of a Unix socket
SOCKET_NAME = "/pymp-abcdefgh/listener-abcdefgh"  # as multiprocessing names its sockets below the temporary folder
SHORT_FOLDERS = tuple(f"{os.sep}{name}" for name in ("tmp", "var/tmp", "dev/shm"))


def set_short_socket_folder() -> None:
    """Let multiprocessing make its sockets in a short folder where that of TMPDIR is too long for them.

    Other temporary files stay in TMPDIR. Raises WorldError where no temporary folder can be written.
    """
    try:
        folder = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise WorldError(f"no folder for temporary files ({error}); set TMPDIR to one that can be written") from None
    size = len(os.fsencode(folder))
    if size + len(SOCKET_NAME) <= MAX_ADDRESS:
        return
    place = next((place for place in SHORT_FOLDERS if os.access(place, os.W_OK | os.X_OK)), None)
    if place is None:
        raise WorldError(
            f"TMPDIR={folder} is too long for the sockets of worker processes ({size} bytes, at most "
            f"{MAX_ADDRESS - len(SOCKET_NAME)}), and {', '.join(SHORT_FOLDERS)} cannot be written; set a shorter one"
        )
    made = tempfile.mkdtemp(prefix="avcil-", dir=place)
    atexit.register(_remove, made, os.getpid())
    # The only way to set this folder alone; processes that are started inherit it.
    multiprocessing.process.current_process()._config["tempdir"] = made  # type: ignore[attr-defined]


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # a forked process leaves the folder to the first one
        shutil.rmtree(folder, ignore_errors=True)
