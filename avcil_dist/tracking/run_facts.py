"""Facts of a run as tags, by the names that users filter by in MLflow: method, seed, host, versions, git commit."""

import getpass
import os
import platform
import socket
from importlib.metadata import PackageNotFoundError, version

import avcil_dist
from avcil_dist.config.schema import Config
from avcil_dist.system.source_version import source_version
from avcil_dist.world import World

# Distributions by the name of their tag. MLflow is installed whole or as its part mlflow-skinny, of the same version.
PACKAGES = {"torch": "torch", "deepspeed": "deepspeed", "webdataset": "webdataset", "mlflow": "mlflow-skinny"}
# MLflow's own names (mlflow.utils.mlflow_tags), without its import.
USER, SOURCE, SOURCE_TYPE = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
COMMIT, DIRTY = "mlflow.source.git.commit", "mlflow.source.git.dirty"


def stream_facts(config: Config) -> dict[str, str]:
    """Return the facts of a stream: what it trains, who started it, and the versions of the code."""
    facts = {"method": config.method.name, "benchmark": config.name, "seed": str(config.seed)}
    facts |= {"version.python": platform.python_version(), "version.avcil-dist": avcil_dist.__version__}
    for name, distribution in PACKAGES.items():
        try:
            facts[f"version.{name}"] = version(distribution)
        except PackageNotFoundError:
            continue
    facts |= {USER: _user(), SOURCE: "avcil", SOURCE_TYPE: "LOCAL"}
    commit, _, dirty = source_version().partition("-")
    return facts | ({COMMIT: commit, DIRTY: str(bool(dirty)).lower()} if commit else {})


def machine_facts(world: World, device: str) -> dict[str, str]:
    """Return the facts of the machines that train a step; `device` is the name of rank 0's."""
    facts = {"host": socket.gethostname(), "device": device, "world_size": str(world.size)}
    job = os.environ.get("SLURM_JOB_ID", "")
    return facts | ({"slurm_job_id": job} if job else {})


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without an entry for its user
        return str(os.getuid())
