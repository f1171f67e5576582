"""Whether files are there. `Path.exists` and `Path.is_file` of Python 3.14 hide all errors, those of 3.13 only some."""

from pathlib import Path


def is_there(path: Path) -> bool:
    """Whether there is a file or a folder.

    Raises OSError where that cannot be found out: without permission for its folder, or for a name that is too long.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file's name has a NUL
        return False
    return True
