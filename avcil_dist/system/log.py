"""Log of a rank on standard error: plain lines on a terminal, else lines with time, host, rank and level.

The level is `warning`, `info` (default) or `debug`, in the variable AVCIL_LOG, which child processes and jobs inherit.
"""

import logging
import os
import socket
import sys
from typing import Literal, TextIO

from avcil_dist.text.visible import visible

VARIABLE = "AVCIL_LOG"
LEVELS = {"warning": logging.WARNING, "info": logging.INFO, "debug": logging.DEBUG}
OWN = ("avcil_dist", "launch", "data_shards")  # other packages log warnings only
Level = Literal["warning", "info", "debug"]


def chosen_level() -> int:
    """Return the level that AVCIL_LOG names; `info` for another word."""
    return LEVELS.get(os.environ.get(VARIABLE, "").lower(), logging.INFO)


def set_up_log(rank: int) -> None:
    """Log to standard error, as rank `rank`. A second call replaces the handler of the first."""
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _StandardError)]:
        root.removeHandler(handler)
    root.addHandler(_StandardError(rank))
    for name in OWN:
        logging.getLogger(name).setLevel(chosen_level())


class _StandardError(logging.StreamHandler[TextIO]):
    """Handler of whatever standard error is now."""

    def __init__(self, rank: int) -> None:
        logging.Handler.__init__(self)
        self.prefix = f"{socket.gethostname().partition('.')[0]} rank {rank}"

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record, and a traceback below it if it has one."""
        text = visible(record.getMessage())
        if record.exc_info:
            text = f"{text}\n{(self.formatter or logging.Formatter()).formatException(record.exc_info)}"
        if self.stream.isatty():
            return text
        time = logging.Formatter().formatTime(record, "%Y-%m-%d %H:%M:%S")
        return f"{time} {self.prefix} {record.levelname} {text}"
