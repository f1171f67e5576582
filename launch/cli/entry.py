"""Start of the command line: what this process and its workers need of their surroundings, before any command runs."""

import atexit
import gc
import os
import sys
import warnings
from pathlib import Path

from avcil_dist.errors import AvcilError, WorldError
from avcil_dist.exit_codes import USER_ERROR
from avcil_dist.system.standard_error import keep_standard_error
from launch.environments import own_environment
from launch.socket_folder import set_short_socket_folder


def run_command(root: Path) -> None:
    """Prepare this process and run the command line. `root` is the folder of this project's packages."""
    keep_standard_error()
    atexit.register(gc.freeze)  # Python searches all objects for garbage as it ends: a second after imports of torch
    try:
        _check_working_folder()
        set_short_socket_folder()
    except AvcilError as error:
        sys.stderr.write(f"avcil: {error}\n")
        sys.exit(USER_ERROR)
    _set_environment(root)
    from launch.cli.main import cli  # after the path is settled

    cli(prog_name="avcil")


def _check_working_folder() -> None:
    try:
        Path.cwd()
    except FileNotFoundError:
        raise WorldError(
            "the working folder was removed; change to another folder, and run the command again"
        ) from None
    except PermissionError as error:
        raise WorldError(f"the working folder cannot be read ({error.strerror}); change to another folder") from None


def _set_environment(root: Path) -> None:
    """Apply the environment of workers to this process, which they inherit it from."""
    if any(option.startswith("error") for option in sys.warnoptions):
        sys.warnoptions.clear()  # a warning of a library is no error of a run
        warnings.filters[:] = [entry for entry in warnings.filters if entry[0] != "error"]  # type: ignore[index]
        warnings.simplefilter("ignore", PendingDeprecationWarning)  # also lets Python see the change
    environment = own_environment(os.environ, root=str(root) if Path.cwd() == root else None)
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
