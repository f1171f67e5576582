"""Documents of the project, and the commands, settings and source references that they hold."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PROJECT = Path(__file__).parents[2]
DOCUMENTS = sorted([*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md")])
RUN_MARK = "<!-- run -->"  # before a block that a test runs
FENCE = re.compile(r"(?:^(?P<mark><!-- run -->)\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block: its language, its text, and whether a test runs it."""

    language: str
    text: str
    is_run: bool


def blocks(document: Path) -> list[Block]:
    """Return the fenced blocks of a document."""
    matches = FENCE.finditer(document.read_text())
    return [Block(match["language"], match["text"], match["mark"] is not None) for match in matches]


def prose(document: Path) -> str:
    """Return the text of a document outside its fenced blocks."""
    return FENCE.sub("", document.read_text())


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in the text of a bash block: comments removed, continued lines joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def avcil_arguments(words: list[str]) -> list[str] | None:
    """Return the arguments of `avcil` in a command; None for another command."""
    if "avcil" in words[0].rsplit("/", 1)[-1:]:
        return words[1:]
    if "-m" in words and words[words.index("-m") + 1 :][:1] == ["launch"]:
        return words[words.index("-m") + 2 :]
    return None


def inline_code(text: str) -> list[str]:
    """Return the inline code of a text, without the backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
