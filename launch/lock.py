"""The lock: `requirements.lock`, the tested versions of all packages that the requirements lead to, with hashes.

    python launch/lock.py [ui,test]      prints the part for these extras, which pip installs with --require-hashes
    python launch/lock.py --write        writes the lock anew from setup.py (needs uv)

This file is run by its path before anything is installed, so it needs the standard library alone. Versions that the
lock has already are kept, unless they are out of the ranges: to change one, change it in the lock, and write that anew.
"""

import ast
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
LOCK = PROJECT / "requirements.lock"
BASE = "base"  # stands for what is needed without extras
HEAD = """\
# The tested versions of all packages for Linux and Python 3.11 to 3.14, with the hashes of their files.
# `python launch/lock.py --write` writes this file; `python launch/lock.py EXTRAS` prints the part for some extras.
"""
USES = "# for "  # begins the line before a package: the extras that need it


def entries(text: str) -> Iterator[tuple[set[str], str]]:
    """Yield the packages of a lock: the extras that need one, and its lines."""
    for block in text.split(f"\n{USES}")[1:]:
        uses, _, lines = block.partition("\n")
        yield set(uses.split(", ")), lines.rstrip("\n")


def part(text: str, extras: Iterable[str]) -> str:
    """Return the requirements of a lock for some extras. Raises ValueError for an extra that it does not have."""
    wanted, found = {BASE, *extras}, list(entries(text))
    if unknown := wanted - set[str]().union(*(uses for uses, _ in found)):
        raise ValueError(f"no such extra: {', '.join(sorted(unknown))}")
    return "".join(f"{lines}\n" for uses, lines in found if uses & wanted)


def with_uses(compiled: str, needed: dict[str, set[str]]) -> str:
    """Return a lock: the output of uv, without the condition that is everywhere (torch has it), and who needs each."""
    [everywhere] = re.findall(r"^torch==\S+( ;.*) \\$", compiled, re.MULTILINE)
    lines = compiled.replace(f"{everywhere} \\\n", " \\\n")
    found = [HEAD.rstrip("\n")]
    for block in re.findall(r"^[^ #\n].*(?:\n +.*)*", lines, re.MULTILINE):
        name = _name(block)
        found.append(f"{USES}{', '.join(use for use, names in needed.items() if name in names)}\n{block}")
    return "\n".join(found) + "\n"


def write() -> None:
    """Write the lock. Raises CalledProcessError where uv fails, which prints the reason."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "requirements.txt"
        output.write_text("".join(f"{lines}\n" for _, lines in entries(LOCK.read_text())) if LOCK.exists() else "")
        _compile("--all-extras", "--generate-hashes", f"--output-file={output}")
        compiled = output.read_text()
        versions = Path(folder) / "versions.txt"
        versions.write_text(re.sub(r" \\\n( +--hash.*\n?)+", "\n", compiled))
        needed = {
            use: {_name(line) for line in _compile(f"--constraint={versions}", *words).splitlines()}
            for use, words in {BASE: (), **{extra: (f"--extra={extra}",) for extra in _extras()}}.items()
        }
    LOCK.write_text(with_uses(compiled, needed))


def _compile(*words: str) -> str:
    common = ("--quiet", "--universal", "--python-version=3.11", "--no-annotate", "--no-header")
    command = ["uv", "pip", "compile", "setup.py"]
    done = subprocess.run([*command, *common, *words], cwd=PROJECT, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def _extras() -> list[str]:
    """The names of the extras in setup.py."""
    for node in ast.walk(ast.parse((PROJECT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "extras_require" and isinstance(node.value, ast.Dict):
            return [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
    raise ValueError("setup.py has no extras_require")


def _name(line: str) -> str:
    return re.split(r"[=; \\\[]", line, maxsplit=1)[0]


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(part(LOCK.read_text(), [word for word in ",".join(sys.argv[1:]).strip("[]").split(",") if word]), end="")
