"""Output of commands: the one function that prints lines, and the ranks that print them."""

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter, FileIO, TextIOWrapper

import click

from avcil_dist.errors import StorageError
from avcil_dist.text.visible import visible
from avcil_dist.world import world_from_environment

CONTINUES = "the same command continues"  # notes of interrupts
CONTINUES_TRAINING = f"{CONTINUES} from the last snapshot"
SMOKE_NOTE = "the smoke run is done, all steps work; its accuracies mean nothing"


def echo(text: str, *, err: bool = False, nl: bool = True) -> None:
    """Print text on standard output, or on standard error. Control characters but line breaks are shown as escapes."""
    click.echo(visible(text, keep_lines=True), err=err, nl=nl)


def echo_list(text: str, indent: int) -> None:
    """Print lines of a list; those that are wider than a terminal continue `indent` columns after their own indent."""
    echo(wrapped(text, shutil.get_terminal_size().columns, indent) if sys.stdout.isatty() else text)


def wrapped(text: str, width: int, indent: int) -> str:
    """Wrap each line between words; its further lines begin `indent` columns after it."""
    lines = []
    for line in text.splitlines():
        space = " " * (len(line) - len(line.lstrip()) + indent)
        wrapper = textwrap.TextWrapper(width, subsequent_indent=space, break_long_words=False, break_on_hyphens=False)
        lines += [line] if len(line) <= width else wrapper.wrap(line)
    return "\n".join(lines)


def echo_error(text: str) -> None:
    """Print an error as one line on standard error."""
    click.echo(f"avcil: {visible(text)}", err=True)


@contextmanager
def interrupt_note(note: str) -> Iterator[None]:
    """Add a note to the line that an interrupt of the block ends the command with; that of an inner block has priority.

    Commands on which an interrupt has no more effect than its end have none.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(*(interrupt.args or (note,))) from None


def is_main_rank() -> bool:
    """Whether this process is rank 0 of its launcher, or has none."""
    return world_from_environment(os.environ).is_main


def echo_once(text: str) -> None:
    """Print a line on standard output, on rank 0 only: under torchrun or srun every rank runs the command."""
    if is_main_rank():
        echo(text)


def echo_progress(text: str) -> None:
    """Print a line on standard error, on rank 0 only."""
    if is_main_rank():
        echo(text, err=True)


def prepare_output() -> None:
    """Print letters that the encoding of standard output lacks as escapes, and make its faults StorageErrors."""
    stream = sys.stdout
    if stream is sys.__stdout__ and isinstance(stream, TextIOWrapper):
        buffer = BufferedWriter(FileIO(stream.fileno(), "w", closefd=False))
        sys.stdout = _Output(
            buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.isatty()
        )


class _Output(TextIOWrapper):
    """Standard output. After a fault the rest of it is dropped, so that the end of the process does not fail too.

    Its methods raise StorageError, or BrokenPipeError where the reader has ended.
    """

    def write(self, text: str, /) -> int:
        """Write the text."""
        with self._typed():
            return super().write(text)

    def flush(self) -> None:
        """Write what is still in the buffer."""
        with self._typed():
            super().flush()

    @contextmanager
    def _typed(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            raise StorageError(
                f"standard output: cannot be written ({error.strerror}); make room, or write elsewhere"
            ) from None
