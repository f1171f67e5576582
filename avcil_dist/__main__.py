"""The command `avcil`, as an installed script and as `python -m avcil_dist`.

The names of the two other packages are common: another program's `launch` or `data_shards` may come first on Python's
path. So this module, whose package has a name of its own, looks before it imports them.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

from avcil_dist.exit_codes import USER_ERROR

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("launch", "data_shards")


def main() -> None:
    """Run the command line. Ends with exit code 2 when a foreign package has the name of one of this project's."""
    _leave_working_folder()
    for name in PACKAGES:
        if found := foreign_package(name):
            sys.stderr.write(
                f"avcil: {found} comes before the package {name!r} of avcil-dist on Python's path; remove its folder "
                "from PYTHONPATH for this command, or use an environment without it\n"
            )
            sys.exit(USER_ERROR)
    from launch.cli.entry import run_command

    run_command(ROOT)


def _leave_working_folder() -> None:
    """Take the working folder off the path where an empty entry of PYTHONPATH means it, as `:/x` has one."""
    entries = os.environ.get("PYTHONPATH", "x").split(os.pathsep)
    with contextlib.suppress(OSError):  # the folder was removed
        here = Path.cwd()
        if here != ROOT and ("" in entries or "." in entries):
            sys.path[:] = [entry for entry in sys.path if entry and Path(entry).absolute() != here]


def foreign_package(name: str) -> str | None:
    """Return the place of a module that hides the package `name` beside this one; None where nothing does."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return "nothing"
    places = [str(place) for place in spec.submodule_search_locations or ()] or [str(spec.origin)]
    return None if any(Path(place).resolve() == ROOT / name for place in places) else places[0]


if __name__ == "__main__":
    # Python puts the working folder first: no `launch.py` or `torch.py` in it may be imported by accident.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != ROOT:
        del sys.path[0]
    main()
