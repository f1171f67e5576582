"""Record of a stream's chain of jobs, and the status files of its steps.

`jobs.json` in the stream's folder is the record (`Chain`). It names the chain's folder, which holds the code, the
configuration, and for each step a log folder (`step_003/`), a progress file (`step_003.json`), and one status file
once the step has ended: `step_003.done`, or `step_003.failed` with the error's line.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated

from pydantic import Field

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.errors import ConfigError
from avcil_dist.streams.identity import StepNumber, has_identity
from avcil_dist.streams.summary import committed_steps
from avcil_dist.system.trusted_files import check_trusted_folder, check_trusted_record
from launch.cluster.resources import ClusterConfig

RECORD, CONFIG, CLUSTER = "jobs.json", "config.yaml", "cluster.json"
MAX_LINE = 1 << 20
JobId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,100}$")]  # it becomes a word of scheduler commands


@dataclass(frozen=True)
class Chain:
    """The jobs of a stream.

    `kind`: of its scheduler. `name`: the end of each job's name. `folder`: of its files. `code`: the copy of the
    code that its jobs run, None for an installed package. `jobs`: the ids of each step's jobs, the newest last.
    """

    kind: Annotated[str, Field(pattern=r"^[a-z]{1,40}$")]
    name: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,500}$")]
    folder: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,4096}$")]
    num_steps: Annotated[int, Field(ge=1, le=100_000)]
    code: Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]{1,4096}$")] | None = None
    jobs: Mapping[StepNumber, tuple[JobId, ...]] = field(default_factory=dict)

    def job_name(self, step: int) -> str:
        """Return the name of a step's job. It begins with the step: tables of schedulers show the first letters."""
        return f"s{step:02d}-{self.name}"

    def newest_job(self, step: int) -> str | None:
        """Return the id of a step's newest job, None where none was recorded."""
        ids = self.jobs.get(step)
        return ids[-1] if ids else None

    def with_job(self, step: int, job: str) -> "Chain":
        """Return the record with a new job."""
        return replace(self, jobs={**self.jobs, step: (*self.jobs.get(step, ()), job)})

    def step_prefix(self, step: int) -> str:
        """Return the path of a step's files without their ending."""
        return step_prefix(self.folder, step)

    def log_folder(self, step: int) -> Path:
        """Return the folder of a step's logs, and of the scripts and pickled ranks of its jobs."""
        return Path(self.step_prefix(step))

    def progress_file(self, step: int) -> str:
        """Return the file in which rank 0 of a step writes its progress."""
        return f"{self.step_prefix(step)}.json"

    def done_file(self, step: int) -> Path:
        """Return the file that exists once a step is done."""
        return done_file(self.folder, step)

    def failed_file(self, step: int) -> Path:
        """Return the file that exists once a step has failed for good; it holds the error's line."""
        return failed_file(self.folder, step)

    def clear_status(self, step: int) -> None:
        """Remove the status files of an earlier job of the step."""
        self.done_file(step).unlink(missing_ok=True)
        self.failed_file(step).unlink(missing_ok=True)

    def failure(self, step: int) -> str | None:
        """Return the error of a step that failed for good, else None."""
        path = str(self.failed_file(step))
        if not storage.exists(path):
            return None
        lines = storage.read_bytes(path, max_bytes=MAX_LINE).decode(errors="replace").splitlines()
        return lines[0] if lines else ""

    def config(self) -> Config:
        """Return the configuration of the last submission."""
        return frozen_config(self.folder)

    def cluster(self) -> ClusterConfig:
        """Return the cluster of the last submission."""
        path = f"{self.folder}/{CLUSTER}"
        return storage.read_json(path, ClusterConfig, "settings of a cluster", fault=ConfigError)

    def freeze(self, config: Config, cluster: ClusterConfig) -> None:
        """Write configuration and cluster to the chain's folder."""
        storage.write_bytes(f"{self.folder}/{CONFIG}", config_to_yaml(config).encode())
        storage.write_bytes(f"{self.folder}/{CLUSTER}", cluster.model_dump_json(indent=1).encode())


def step_prefix(folder: str, step: int) -> str:
    """See `Chain.step_prefix`."""
    return f"{folder}/step_{step:03d}"


def done_file(folder: str, step: int) -> Path:
    """See `Chain.done_file`."""
    return Path(f"{step_prefix(folder, step)}.done")


def failed_file(folder: str, step: int) -> Path:
    """See `Chain.failed_file`."""
    return Path(f"{step_prefix(folder, step)}.failed")


def mark_failed(folder: str, step: int, text: str) -> None:
    """Write the status file of a failed step, which ends the chain. Raises StorageError where it cannot be written."""
    storage.write_bytes(str(failed_file(folder, step)), f"{text}\n".encode())


def frozen_config(folder: str) -> Config:
    """See `Chain.config`."""
    text = storage.read_bytes(f"{folder}/{CONFIG}", max_bytes=storage.MAX_JSON_BYTES).decode(errors="replace")
    return config_from_yaml(text)


def has_chain(stream: str) -> bool:
    """Whether jobs of this stream were ever submitted."""
    return storage.exists(storage.join(stream, RECORD))


def read_chain(stream: str) -> Chain:
    """Read the record of a stream's jobs. Raises ConfigError where none was submitted."""
    if not has_chain(stream):
        if has_identity(stream) or committed_steps(stream):
            raise ConfigError(
                f"{stream}: a command trained it, not jobs, so it has neither jobs nor log files; see its steps with: "
                f"avcil status {stream}"
            )
        raise ConfigError(
            f"{stream}: no jobs were submitted for a stream in this folder; give the folder that `avcil submit` printed"
        )
    return storage.read_json(storage.join(stream, RECORD), Chain, "a record of a chain of jobs", fault=ConfigError)


def read_own_chain(stream: str) -> Chain:
    """Read the record of a stream whose jobs this process may end or run.

    Raises ConfigError where the record, or the folder that it names, belongs to another user or can be written by one.
    """
    chain = read_chain(stream)
    if (path := storage.local_path(storage.join(stream, RECORD))) is not None:
        check_trusted_record(Path(path))
    if Path(chain.folder).exists():
        check_trusted_folder(Path(chain.folder))
    return chain


def write_chain(stream: str, chain: Chain) -> None:
    """Write the record atomically."""
    storage.write_json(storage.join(stream, RECORD), asdict(chain))
