"""Files that carry code, such as compiled libraries and pickled jobs: loaded only if no other user can write them.

A folder or file is trusted if it belongs to the user of this process and other users cannot write it. The check is made
on the name itself: a symbolic link is not followed.
"""

import logging
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from avcil_dist.errors import ConfigError

log = logging.getLogger(__name__)

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH


def make_private_folder(folder: Path) -> Path:
    """Make a folder that only this user can read, write or enter, if it is not there; its parents as needed.

    Raises ConfigError for one that is there and not trusted, OSError as `mkdir` does.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    check_trusted_folder(folder)
    return folder


def user_cache() -> Path:
    """Return the folder of the user's caches. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def private_cache(otherwise: str) -> Path | None:
    """Return the user's cache folder; None if it cannot be written or is not trusted.

    `otherwise`: the consequence, for the warning about a folder that is not trusted.
    """
    try:
        folder = user_cache() / "avcil-dist"
        make_private_folder(folder)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except ConfigError as error:
        log.warning("%s: %s", otherwise, error)
    except (OSError, RuntimeError):  # no home
        return None
    return None


def is_trusted_file(path: Path) -> bool:
    """Whether the file is there and no other user can have written it."""
    try:
        check_trusted_file(path)
    except (ConfigError, OSError):
        return False
    return True


def check_trusted_folder(folder: Path) -> None:
    """Check that a folder belongs to this user and others cannot write it. Raises ConfigError, OSError if missing."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{folder}: not a folder, or a link to one; remove it, or name another")
    _check_owner(folder, status)
    if status.st_mode & OTHERS_WRITE:
        raise ConfigError(f"{folder}: others can write it, so its content is not trusted; run: chmod go-w {folder}")


def check_trusted_file(path: Path) -> None:
    """Check a file that carries code, and its folder. Raises ConfigError, and OSError where it is missing.

    The file may have the rights of a generous umask if others cannot enter its folder.
    """
    check_trusted_folder(path.parent)
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file, so it is not trusted; remove it")
    _check_owner(path, status)
    if status.st_mode & OTHERS_WRITE and path.parent.lstat().st_mode & OTHERS_ENTER:
        raise ConfigError(f"{path}: others can write it, so it is not trusted; remove it")


def check_trusted_record(path: Path) -> None:
    """Check that a file, in whatever folder, was written by this user. Raises ConfigError, and OSError if missing."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file, so it is not trusted; remove it")
    _check_owner(path, status)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.getuid():
        raise ConfigError(f"{path}: belongs to another user, so it is not trusted; name a folder of your own")
