"""The command `avcil`, as an installed script and as `python -m avcil_dist`.

The names of the two other packages are common: another program's `launch` or `data_shards` may come first on Python's
path. So this module, whose package has a name of its own, looks before it imports them.
"""

import contextlib
import os
import sys
from pathlib import Path

from avcil_dist.exit_codes import USER_ERROR
from avcil_dist.system.own_packages import ROOT, fault


def main() -> None:
    """Run the command line. Ends with exit code 2 when a foreign package has the name of one of this project's."""
    _leave_working_folder()
    if found := fault():
        sys.stderr.write(f"avcil: {found}\n")
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


if __name__ == "__main__":
    # Python puts the working folder first: no `launch.py` or `torch.py` in it may be imported by accident.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != ROOT:
        del sys.path[0]
    main()
