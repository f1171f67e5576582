"""Record of the jobs that make shards by parts: one job for each part, and one that merges them when all are done.

The folder holds the record, the scripts, a log of each part and of the merge, and the exit code of each that has ended.
"""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from avcil_dist import storage

RECORD, MERGE = "parts.json", "merge"
PROGRAM = "avcil_dist"  # the module that is the command `avcil`
ERROR_LINE = re.compile(r"^avcil: (.+)$", re.MULTILINE)
LOG_END_BYTES = 1 << 16


@dataclass(frozen=True)
class PartJobs:
    """The parts of a build.

    `kind`: of the scheduler. `folder`: of the files. `count`: the number of parts. `command` and `merge`: the words
    after the program, without the option `--part` of a part. `code`: the folder that comes first on Python's
    path, None for an installed package. `working`: the folder to start in. `ranks`: the number of processes of a part.
    """

    kind: str
    folder: str
    count: int
    command: tuple[str, ...]
    merge: tuple[str, ...]
    code: str | None
    working: str
    ranks: int

    @property
    def names(self) -> list[str]:
        """The names of the parts, and of the merge."""
        return [*(f"part_{number}" for number in range(1, self.count + 1)), MERGE]

    def command_of(self, part: str) -> tuple[str, ...]:
        """The words of a part, `I/N`. The option follows the command's name: after `--` there are arguments only."""
        return (*self.command[:2], "--part", part, *self.command[2:])

    def log(self, name: str) -> Path:
        """The log of a part, or of the merge."""
        return Path(self.folder, f"{name}.log")

    def code_file(self, name: str) -> Path:
        """The file with the exit code of a part, or of the merge, that has ended."""
        return Path(self.folder, f"{name}.code")

    def clear(self) -> None:
        """Remove logs and exit codes of an earlier submission."""
        for name in self.names:
            self.log(name).unlink(missing_ok=True)
            self.code_file(name).unlink(missing_ok=True)

    def failures(self) -> Iterator[tuple[str, str]]:
        """The name of each part that has failed, or has not ended, and the last error, or line, of its log."""
        for name in self.names:
            file = self.code_file(name)
            code = file.read_text().strip() if file.exists() else None
            if code != "0":
                yield name, (_last_error(self.log(name)) or f"exit code {code}") if code else "it was ended"

    def save(self) -> None:
        """Write the record."""
        storage.write_json(f"{self.folder}/{RECORD}", asdict(self))

    @classmethod
    def load(cls, folder: str) -> "PartJobs":
        """Read the record of a folder."""
        return storage.read_json(f"{folder}/{RECORD}", cls, "a record of parts")


def _last_error(log: Path) -> str | None:
    if not log.exists():
        return None
    with storage.open_regular(log) as file:
        file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
        text = file.read().decode(errors="replace")
    lines = ERROR_LINE.findall(text) or [line for line in text.splitlines() if line.strip()]
    return str(lines[-1]) if lines else None
