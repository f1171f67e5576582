"""The code that jobs run: that of the moment of their submission, however long they wait."""

import hashlib
import shutil
from pathlib import Path

import avcil_dist

KEPT = ("avcil_dist", "data_shards", "launch", "configs")


def source_folder() -> Path | None:
    """The checkout that this program runs from; None when it is installed."""
    root = Path(avcil_dist.__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() else None


def snapshot_place(folder: Path) -> Path | None:
    """Where `snapshot_code` puts the code as it is now."""
    root = source_folder()
    if root is None:
        return None
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return folder / f"code-{digest.hexdigest()[:12]}"


def snapshot_code(folder: Path) -> Path | None:
    """Copy the checkout's packages below `folder`, once for each state they are in; None when installed.

    Installed code does not change under a job by itself, and stays where it is.
    """
    root, place = source_folder(), snapshot_place(folder)
    if root is None or place is None or place.exists():
        return place
    unfinished = folder / f".{place.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in _files(root):
        copy = unfinished / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return unfinished.rename(place)


def _files(root: Path) -> list[Path]:
    found = (path for name in KEPT for path in sorted((root / name).rglob("*")))
    return [path for path in found if path.is_file() and "__pycache__" not in path.parts]
