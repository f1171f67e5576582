"""Tars of others, with given files."""

import io
import tarfile
from pathlib import Path


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> str:
    """Write a tar of the files by name, in their order; return its path. `mode` is that of `tarfile.open`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)
