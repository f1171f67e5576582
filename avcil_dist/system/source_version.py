"""Version of the sources in a checkout: the git commit that this program runs from."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIT_SECONDS = 10
VERSION_FILE = "SOURCE_VERSION"
MAX_LENGTH = 100


def source_version(root: Path = ROOT) -> str:
    """Return the abbreviated commit of the checkout `root`, with `-dirty` where tracked files are changed.

    Empty where the program is not run from a checkout, or git is missing.
    """
    if not (root / ".git").exists():
        copied = root / VERSION_FILE  # of a copy of a checkout, which jobs run
        return copied.read_text().strip()[:MAX_LENGTH] if copied.is_file() else ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
