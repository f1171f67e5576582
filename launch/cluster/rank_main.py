"""Program of one rank of a submitted job: it starts the pickled `RankEntry` with submitit.

Run as `python -m launch.cluster.rank_main FOLDER [FILE]`; FILE is the pickle in FOLDER. Without it submitit's name is
used, which contains the job's id.
"""

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from submitit.core.job_environment import JobEnvironment
from submitit.core.submission import process_job

from avcil_dist.errors import ConfigError, StorageError
from avcil_dist.exit_codes import USER_ERROR
from avcil_dist.system.process_start import settle_rank
from avcil_dist.system.signals import STOP_SIGNALS
from avcil_dist.system.trusted_files import check_trusted_folder
from launch.cluster.chain_record import mark_failed
from launch.socket_folder import set_short_socket_folder


def main(folder: str, file: str | None = None) -> None:
    """Run the rank that the environment names."""
    settle_rank()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # pending until the step handles them, not submitit
    _check_trusted(Path(folder))
    set_short_socket_folder()
    logging.getLogger("submitit").propagate = False  # it prints its lines itself
    if file is not None:
        os.environ["SUBMITIT_FOLDER"] = folder
        link = JobEnvironment().paths.submitted_pickle
        new_link = link.with_name(f".{link.name}.{socket.gethostname()}.{os.getpid()}")
        new_link.symlink_to(file)
        new_link.replace(link)  # all ranks write the same one; an earlier job may have had the same id
    process_job(folder)


def _check_trusted(folder: Path) -> None:
    """End this process, and the chain, where another user can have written the folder of the pickle."""
    try:
        check_trusted_folder(folder.parent)
        check_trusted_folder(folder)
    except ConfigError as error:
        sys.stderr.write(f"avcil: {error}\n")
        with suppress(StorageError):  # a folder of another user
            mark_failed(str(folder.parent), int(folder.name.removeprefix("step_")), str(error))
        sys.exit(USER_ERROR)


if __name__ == "__main__":
    main(*sys.argv[1:])
