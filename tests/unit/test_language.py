"""The language rule: a docstring begins with a noun or an imperative, and names machines' actions plainly."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
FILES = sorted(
    path for package in ("avcil_dist", "data_shards", "launch") for path in (PROJECT / package).rglob("*.py")
)
QUESTION = re.compile(r"(What|Where|How|Who|Which|Why)\b")  # "Whether …" is the form of a predicate
# Verbs of people. A person may use them: "the user wants". "known" and "unknown" are adjectives.
PRIVATE = re.compile(
    r"(?<!\buser )(?<!\busers )(?<!\byou )\b(?:"
    r"says?|said|saying|tells?|told|telling|asks?|asked|asking|hears?|heard|knows?|knew|knowing"
    r"|wants?|wanted|promises?|promised|heeds?|mends?|mended|mending"
    r"|at hand|go(?:es)? on|went on|held against|hold(?:s)? against"
    r")\b",
    re.IGNORECASE,
)


def docstrings(text: str) -> Iterator[tuple[int, str]]:
    """The line and the text of each docstring of a module's source."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield node.body[0].lineno, docstring


def faults(text: str) -> list[str]:
    """Each breach of the rule as `line: words`."""
    found = []
    for line, docstring in docstrings(text):
        if QUESTION.match(docstring):
            found.append(f"{line}: begins with a question word: {docstring.splitlines()[0]}")
        prose = re.sub(r"`[^`]*`", "", docstring)
        found += [f"{line}: {match[0]!r} in: {docstring.splitlines()[0]}" for match in PRIVATE.finditer(prose)]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_docstrings_are_in_plain_technical_english(path: Path) -> None:
    assert not faults(path.read_text())


@pytest.mark.parametrize(
    "docstring",
    [
        "What the teacher gives.",
        "Which clip is where.",
        "Why it failed.",
        "Cache that is told of clips.",
        "Clips at hand.",
        "The next step goes on from it.",
        "Digest, held against the file.",
    ],
)
def test_a_breach_is_found(docstring: str) -> None:
    assert faults(f'def f():\n    """{docstring}"""\n')


@pytest.mark.parametrize(
    "docstring",
    [
        "Whether the clip is cached.",
        "Cache of teacher outputs, with `ask` and `told` as keys.",
        "Settings that the user wants to change; an unknown or known key.",
        "However many ranks, the order is one.",
    ],
)
def test_plain_english_is_accepted(docstring: str) -> None:
    assert not faults(f'class C:\n    """{docstring}"""\n')
