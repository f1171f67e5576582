"""Copy of the project's code at submission: jobs run it, however long they wait and whatever is edited meanwhile."""

import hashlib
import shutil
from pathlib import Path

import avcil_dist
from avcil_dist.system.source_version import VERSION_FILE, source_version

COPIED_FOLDERS = ("avcil_dist", "data_shards", "launch", "configs")


def source_folder() -> Path | None:
    """Return the checkout that this program runs from; None when it is installed."""
    root = Path(avcil_dist.__file__).resolve().parents[1]
    return root if (root / "setup.py").is_file() else None


def snapshot_folder(folder: Path) -> Path | None:
    """Return the folder below `folder` that `snapshot_code` copies the present code to; None when installed."""
    root = source_folder()
    if root is None:
        return None
    digest = hashlib.sha256()
    for path in _files(root):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return folder / f"code-{digest.hexdigest()[:12]}"


def snapshot_code(folder: Path) -> Path | None:
    """Copy the checkout's packages below `folder`, once for each state of them; None when installed.

    An installed package does not change while jobs wait, and is not copied.
    """
    root, target = source_folder(), snapshot_folder(folder)
    if root is None or target is None or target.exists():
        return target
    unfinished = folder / f".{target.name}"
    shutil.rmtree(unfinished, ignore_errors=True)
    for path in _files(root):
        copy = unfinished / path.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    (unfinished / VERSION_FILE).write_text(source_version(root))
    return unfinished.rename(target)


def _files(root: Path) -> list[Path]:
    paths = (path for name in COPIED_FOLDERS for path in sorted((root / name).rglob("*")))
    return [path for path in paths if path.is_file() and "__pycache__" not in path.parts]
