"""Process that runs the parts of a build on this machine, one after the other, and merges them.

Started by `schedulers/local.py` as `python -m launch.cluster.schedulers.local_parts FOLDER`. SIGTERM ends it, and the
part that runs.
"""

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from avcil_dist.system.process_start import end_with_parent
from avcil_dist.system.trusted_files import check_trusted_folder
from launch.cluster.part_jobs import MERGE, PROGRAM, PartJobs
from launch.cluster.schedulers.local import supervising

STOP_SECONDS = 30.0


def main(folder: str) -> None:
    """Run all parts of the record in a folder; the first that fails ends them."""
    check_trusted_folder(Path(folder))
    with supervising(folder):
        work = PartJobs.load(folder)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        for number in range(1, work.count + 1):
            if _run(work, f"part_{number}", [*work.command_of(f"{number}/{work.count}")]):
                return
        _run(work, MERGE, list(work.merge))


def _run(work: PartJobs, name: str, words: list[str]) -> int:
    """Run one command to its end; its exit code is also written to a file."""
    with work.log(name).open("ab") as log:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(work.ranks), "-m"]
        is_parallel = work.ranks > 1 and name != MERGE
        command = [sys.executable, "-m", *(torchrun if is_parallel else []), PROGRAM, *words]
        process = subprocess.Popen(
            command,
            cwd=work.working,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=partial(end_with_parent, signal.SIGTERM),  # torchrun then ends its ranks
        )
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)
    work.code_file(name).write_text(f"{code}\n")
    return code


if __name__ == "__main__":
    main(*sys.argv[1:])
