"""The record of a stream's jobs, and how each step ended: files that any command may read.

`jobs.json` in the stream's folder is the record; code, configuration, logs and marks are in the folder that it names.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.errors import ConfigError
from launch.cluster.resources import ClusterConfig

RECORD, CONFIG, CLUSTER = "jobs.json", "config.yaml", "cluster.json"
DONE, FAILED = "done", "failed"


@dataclass(frozen=True)
class Chain:
    """The jobs of a stream. `name` begins the name of each; `jobs` holds each step's, the newest last."""

    kind: str
    name: str
    folder: str
    num_steps: int
    code: str | None = None
    jobs: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    @property
    def job_prefix(self) -> str:
        """How the names of its jobs begin, and no others'."""
        return f"{self.name}-step_"

    def job_name(self, step: int) -> str:
        """The name of a step's job."""
        return f"{self.job_prefix}{step:03d}"

    def mark(self, step: int) -> str:
        """The path, without its ending, of the files that tell of a step."""
        return mark_of(self.folder, step)

    def note(self, step: int) -> str:
        """The file in which the step's rank 0 says how far it is."""
        return f"{self.mark(step)}.json"

    def logs(self, step: int) -> Path:
        """The folder of a step's logs, which is submitit's."""
        return Path(self.mark(step))

    def with_job(self, step: int, job: str) -> "Chain":
        """The record with a new job."""
        return replace(self, jobs={**self.jobs, step: (*self.jobs.get(step, ()), job)})

    def clear_marks(self, step: int) -> None:
        """Forget how an earlier job of the step ended."""
        for ending in (DONE, FAILED):
            Path(f"{self.mark(step)}.{ending}").unlink(missing_ok=True)

    def failure(self, step: int) -> str | None:
        """Why the step failed for good, None unless it did."""
        path = Path(f"{self.mark(step)}.{FAILED}")
        return path.read_text().strip() if path.exists() else None

    def config(self) -> Config:
        """The configuration of the last submission."""
        return config_in(self.folder)

    def cluster(self) -> ClusterConfig:
        """The cluster of the last submission."""
        return ClusterConfig.model_validate_json(Path(self.folder, CLUSTER).read_text())

    def freeze(self, config: Config, cluster: ClusterConfig) -> None:
        """Keep the settings of this moment."""
        storage.write_bytes(f"{self.folder}/{CONFIG}", config_to_yaml(config).encode())
        storage.write_bytes(f"{self.folder}/{CLUSTER}", cluster.model_dump_json(indent=1).encode())


def mark_of(folder: str, step: int) -> str:
    """See `Chain.mark`."""
    return f"{folder}/step_{step:03d}"


def config_in(folder: str) -> Config:
    """See `Chain.config`."""
    return config_from_yaml(Path(folder, CONFIG).read_text())


def mark_failed(folder: str, step: int, text: str) -> None:
    """Say why a step failed for good, which ends the chain."""
    Path(f"{mark_of(folder, step)}.{FAILED}").write_text(f"{text}\n")


def has_chain(stream: str) -> bool:
    """Whether jobs of this stream were ever submitted."""
    return storage.exists(storage.join(stream, RECORD))


def read_chain(stream: str) -> Chain:
    """The record of a stream's jobs. Raises ConfigError where none was submitted."""
    if not has_chain(stream):
        raise ConfigError(
            f"{stream}: no jobs were submitted of a stream there; give the folder that `avcil submit` named"
        )
    found = storage.read_json(storage.join(stream, RECORD))
    return Chain(**found | {"jobs": {int(step): tuple(ids) for step, ids in found["jobs"].items()}})


def write_chain(stream: str, chain: Chain) -> None:
    """Write the record, as a whole."""
    storage.write_json(storage.join(stream, RECORD), asdict(chain))
