"""A clip transform that some clips crash, as a broken decoder does: by a real signal in the process that decodes."""

import os
import signal
import sys
import time

from avcil_dist.data.transforms import ClipTransform
from avcil_dist.errors import DataError

SEGFAULT, ONCE, BUG, DAMAGED = b"crash the decoder", b"crash it once: ", b"a bug", b"damaged"
NOISY, SILENT = b"a line on a full standard error", b"no answer"


def write_to_full_standard_error() -> None:
    """Write a line where the disk behind the standard error of this worker process is full."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
    sys.stderr.write("a line\n")
    sys.stderr.flush()


class LethalTransform(ClipTransform):
    """Decodes as `ClipTransform` does, apart from clips whose bytes begin with one of the words above."""

    def decode(self, data, *, where, seed=None):  # type: ignore[no-untyped-def]
        content = bytes(data)
        if content.startswith(SEGFAULT):
            signal.raise_signal(signal.SIGSEGV)
        if content.startswith(ONCE):  # the path of a marker file follows, up to a new line, and then a good clip
            path, content = content.removeprefix(ONCE).split(b"\n", 1)
            if not os.path.exists(path):  # noqa: PTH110 - bytes
                os.close(os.open(path, os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
        if content.startswith(NOISY):
            write_to_full_standard_error()
            content = content.removeprefix(NOISY)
        if content.startswith(SILENT):
            time.sleep(60)
        if content.startswith(BUG):
            raise ZeroDivisionError
        if content.startswith(DAMAGED):
            raise DataError(f"{where}: truncated")
        return super().decode(content, where=where, seed=seed)


END = b"lethal"
CRASH, DAMAGE = "signal.raise_signal(signal.SIGSEGV)", "raise ValueError('damaged')"


def decoder_hook(fault: str) -> str:
    """Text of a sitecustomize.py: in every process of a command, PyAV has a fault on files that end with END."""
    return f"""
import os, signal
import av

open_container = av.open

def open_or_fail(file, *arguments, **settings):
    if hasattr(file, "getvalue") and file.getvalue().endswith({END!r}):
        {fault}
    return open_container(file, *arguments, **settings)

av.open = open_or_fail
"""
