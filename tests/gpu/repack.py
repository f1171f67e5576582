"""Wheels compressed anew, by LZMA, so that more of them fit where a transfer has a limit. pip reads them.

Usage: python -m tests.gpu.repack WHEEL...
"""

import sys
import zipfile
from pathlib import Path


def repack(wheel: Path) -> None:
    """Replace a wheel by one with the same files, if that is smaller."""
    smaller = wheel.with_suffix(".lzma")
    with (
        zipfile.ZipFile(wheel) as source,
        zipfile.ZipFile(smaller, "w", zipfile.ZIP_LZMA) as target,
    ):
        for member in source.infolist():
            if not member.is_dir():
                data = source.read(member)
                member.compress_type = zipfile.ZIP_LZMA
                target.writestr(member, data)
    if smaller.stat().st_size < wheel.stat().st_size:
        smaller.replace(wheel)
    else:
        smaller.unlink()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        repack(Path(name))
