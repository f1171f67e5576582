"""Build by parts on a cluster: submission, progress, and result. The jobs do not need the process that watches them.

Submitting is idempotent: jobs that wait or run are kept, and parts continue with the shards that are not done.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from avcil_dist import storage
from avcil_dist.errors import ConfigError, SchedulerError
from avcil_dist.system.trusted_files import make_private_folder
from data_shards.build_plan import MANIFEST, clips_of_parts
from launch.cluster.chain import check_jobs_folder
from launch.cluster.code_snapshot import snapshot_code, snapshot_folder
from launch.cluster.part_jobs import PartJobs
from launch.cluster.resources import ClusterConfig
from launch.cluster.schedulers.base import scheduler_of

FOLDER = "jobs"
LOCK_SECONDS = 60
POLL_SECONDS = 5.0
GRACE_SECONDS = 60.0  # files of a job that has ended may be seen late on a shared disk


def plan_parts(
    output: str, cluster: ClusterConfig, count: int, command: Sequence[str], *, strict: bool, ranks: int
) -> PartJobs:
    """Return the jobs of `count` parts of an `avcil shards` command; nothing is submitted.

    Raises ConfigError for resources that a part cannot have, and for a folder that jobs cannot have.
    """
    scheduler_of(cluster.kind).check(cluster)
    if cluster.nodes > 1:
        raise ConfigError(f"cluster file: nodes={cluster.nodes}: a part runs on one node; give more parts (--parts)")
    path = storage.local_path(output)
    if cluster.folder is not None:
        folder = Path(cluster.folder, f"parts-{storage.sha256((path or output).encode())[:12]}")
    elif path is not None:
        folder = Path(path, FOLDER)
    else:
        raise ConfigError(f"{output} is not on a disk: set `folder` in the cluster file, on a disk of all nodes")
    check_jobs_folder(folder)
    code = snapshot_folder(folder)
    merge = ("shards", "merge", *(["--strict"] if strict else []), "--", output)
    working = str(Path.cwd())
    return PartJobs(
        cluster.kind, str(folder), count, tuple(command), merge, str(code) if code else None, working, ranks
    )


def submit_parts(cluster: ClusterConfig, work: PartJobs) -> bool:
    """Submit the jobs, if none of them waits or runs. Returns whether new jobs were submitted.

    Raises ConfigError where jobs of other settings wait or run, SchedulerError where the scheduler refuses.
    """
    scheduler = scheduler_of(cluster.kind)
    scheduler.require()
    folder = Path(work.folder)
    try:
        with (
            storage.writing(folder, storage.REFUSED),
            FileLock(make_private_folder(folder) / "submit.lock", timeout=LOCK_SECONDS),
        ):
            if scheduler.live_parts(work):
                submitted = PartJobs.load(work.folder)
                if (submitted.command, submitted.count) != (work.command, work.count):
                    raise ConfigError(
                        f"{work.folder}: jobs of {submitted.count} parts with other settings wait or run; "
                        f"end them first: {scheduler.cancel_command(work)}"
                    )
                return False
            snapshot_code(folder)
            work.clear()
            work.save()
            scheduler.submit_parts(cluster, work)
            return True
    except Timeout:
        raise SchedulerError(f"{work.folder}: another submission of these parts is under way; try again") from None


def wait_for_parts(output: str, work: PartJobs, progress: Callable[[int, int], None]) -> None:
    """Wait until the manifest is written; `progress` is called with the number of clips of finished shards and all.

    Raises SchedulerError, with the first error and the number of parts that failed, when the jobs end without one.
    """
    scheduler = scheduler_of(work.kind)
    manifest = storage.join(output, MANIFEST)
    ended = 0.0
    while True:
        is_live = bool(scheduler.live_parts(work))
        if not is_live and storage.exists(manifest):
            return
        if counts := clips_of_parts(output):
            progress(*counts)
        if not is_live:
            failures = list(work.failures())
            ended = ended or time.monotonic()
            if any(work.code_file(name).exists() for name, _ in failures) or time.monotonic() > ended + GRACE_SECONDS:
                raise _failed(work, failures)
        time.sleep(POLL_SECONDS if is_live else 1.0)


def _failed(work: PartJobs, failures: Sequence[tuple[str, str]]) -> SchedulerError:
    """The error for parts that have failed: first those with an exit code, since others were ended because of them."""
    ranked = sorted(failures, key=lambda failure: not work.code_file(failure[0]).exists())
    name, error = ranked[0] if ranked else ("merge", "no manifest was written")
    more = f" ({len(failures)} of {len(work.names)} jobs are not done)" if len(failures) > 1 else ""
    return SchedulerError(f"{name}: {error}{more}; see {work.log(name)}; the same command continues")
