"""A stream of one short step, trained by the command in other surroundings: its bits must not depend on them."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.streams import weights_digest, write_config

PROJECT = Path(__file__).parents[2]
ONE_STEP = ("scenario.classes_per_step=[6]", "optim.epochs=2")
# Variables of the shell that runs the tests which the surroundings of a test must not have.
CLEARED = ("OMP_NUM_THREADS", "PYTHONPATH", "PYTHONWARNINGS", "TMPDIR")


# $1: a folder that others may not enter; $2: an empty folder that takes its place; then the folders in it to keep.
SHOWN = """
hidden=$1 view=$2; shift 2
while [ "$1" != -- ]; do
    mkdir -p "$view/${1#"$hidden"}" && mount --bind "$1" "$view/${1#"$hidden"}" || exit; shift
done
mount --rbind "$view" "$hidden" && shift && exec "$@"
"""


@dataclass(frozen=True)
class ReferenceRun:
    """A folder that every user can read and write, the configuration in it, and the digest of the weights."""

    folder: Path
    config: Path
    digest: str


def reference_run(folder: Path) -> ReferenceRun:
    """Train the stream in plain surroundings."""
    folder.chmod(0o777)
    config = write_config(folder)
    digest = trained_digest(config, folder / "plain")
    return ReferenceRun(folder, config, digest)


def as_user(user: int, view: Path) -> list[str]:
    """The words before a command that is run as another user (as root), who can read the interpreter and the project.

    Where they lie below a folder of root's alone, as root's home often is, the command has a view of the file system of
    its own (a mount namespace), in which `view`, with these folders and nothing else, stands in that folder's place.
    """
    words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    needed = sorted({sys.base_prefix, sys.prefix, str(PROJECT)})
    above = {parent for folder in needed for parent in Path(folder).parents}
    hidden = sorted(str(parent) for parent in above if not parent.stat().st_mode & 0o001)
    if not hidden:
        return words
    view.mkdir(mode=0o755)
    kept = [folder for folder in needed if folder.startswith(f"{hidden[0]}/")]
    return ["unshare", "--mount", "sh", "-c", SHOWN, "-", hidden[0], str(view), *kept, "--", *words]


def command(config: Path, output: Path, *words: str, options: Sequence[str] = ()) -> list[str]:
    """The command that trains the stream; `options` are those of the interpreter."""
    own = ["-m", "avcil_dist", "train", str(config), *ONE_STEP, f"output={output}"]
    return [sys.executable, *options, *own, *words]


def surroundings(changes: Mapping[str, str | None]) -> dict[str, str]:
    """This environment with changes; None removes a variable."""
    plain = {name: value for name, value in os.environ.items() if name not in CLEARED}
    return {
        name: value for name, value in {**plain, "PYTHONPATH": str(PROJECT), **changes}.items() if value is not None
    }


def trained_digest(
    config: Path,
    output: Path,
    *words: str,
    before: Sequence[str] = (),
    options: Sequence[str] = (),
    folder: Path = PROJECT,
    changes: Mapping[str, str | None] | None = None,
) -> str:
    """Train the stream by a command that begins with `before`; the digest of its weights."""
    done = subprocess.run(
        [*before, *command(config, output, *words, options=options)],
        cwd=folder,
        env=surroundings(changes or {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return weights_digest(f"{output}/tiny-avcil-seed0", 0)
