"""Console of progress bars, on standard error."""

import sys

from rich.console import Console


def progress_console() -> Console:
    """Return the console.

    FORCE_COLOR, as notebooks set it, makes no terminal of a pipe: a bar would fill the output.
    """
    return Console(stderr=True, force_terminal=None if sys.stderr.isatty() else False)
