"""Programs of SLURM in a folder of the path: they print what a test sets, and record arguments and environment."""

import fcntl
import json
import sys
from pathlib import Path

PROGRAMS = ("sbatch", "squeue", "sacct", "scancel", "scontrol", "srun")
FAKE = f"""#!{sys.executable} -I
import fcntl, json, os, sys, time
from pathlib import Path
folder, name = Path(sys.argv[0]).parent, Path(sys.argv[0]).name
with (folder / "calls").open("a+") as calls:
    fcntl.flock(calls, fcntl.LOCK_EX)  # ranks call at once, and a long line is written in parts
    calls.write(json.dumps([name, sys.argv[1:], dict(os.environ)]) + "\\n")
    calls.flush()
    calls.seek(0)
    number = sum(json.loads(line)[0] == name for line in calls)
answer = json.loads((folder / f"{{name}}.json").read_text())
time.sleep(answer["seconds"])
sys.stdout.write(answer["output"].replace("{{number}}", str(number)))
sys.exit(answer["code"])
"""


class FakeSlurm:
    """Programs of SLURM in a folder of the path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in PROGRAMS:
            (folder / name).write_text(FAKE)
            (folder / name).chmod(0o755)
            self.answer(name, "")
        self.answer("sbatch", "{number}\n")

    def answer(self, name: str, output: str, *, code: int = 0, seconds: float = 0) -> None:
        """Set the output of a program; `{number}` in it is the number of its calls."""
        (self.folder / f"{name}.json").write_text(json.dumps({"output": output, "code": code, "seconds": seconds}))

    def calls(self, name: str) -> list[tuple[list[str], dict[str, str]]]:
        """Return arguments and environment of each call of a program."""
        log = self.folder / "calls"
        if not log.exists():
            return []
        with log.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # no program writes now
            lines = [json.loads(line) for line in file]
        return [(arguments, environment) for program, arguments, environment in lines if program == name]
