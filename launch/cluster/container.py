"""Container of a job: the words before Python that start it in an image, with the folders that it needs.

Two runtimes, by the image: Apptainer for a file `.sif` and for `docker://…`, else the SLURM plug-in Pyxis, for a file
`.sqsh` and for the name of an image in a registry. Pure: nothing is started here.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.cluster.resources import ClusterConfig


def python_words(cluster: ClusterConfig, folders: Sequence[Path], own: str) -> list[str]:
    """Return the command of Python in a step that `srun_words` belongs to. `own`: the interpreter of this process.

    `folders`: of the job on the host, the same in the container.
    """
    python = cluster.python or ("python" if cluster.container else own)
    if cluster.container is None or not _is_apptainer(cluster.container):
        return [python]
    gpus = ["--nv"] if cluster.gpus_per_node else []
    return ["apptainer", "exec", *gpus, "--bind", _mounts(cluster, folders), cluster.container, python]


def srun_words(cluster: ClusterConfig, folders: Sequence[Path]) -> list[str]:
    """Return the arguments of srun for a container that Pyxis starts; none otherwise."""
    if cluster.container is None or _is_apptainer(cluster.container):
        return []
    return [f"--container-image={cluster.container}", f"--container-mounts={_mounts(cluster, folders)}"]


def single_python_words(cluster: ClusterConfig, folders: Sequence[Path], own: str) -> list[str]:
    """Return the command of one Python process in a job's script, outside any step."""
    words = python_words(cluster, folders, own)
    pyxis = srun_words(cluster, folders)
    return ["srun", "--nodes=1", "--ntasks=1", "--export=ALL", *pyxis, *words] if pyxis else words


def _is_apptainer(image: str) -> bool:
    return image.endswith(".sif") or "://" in image


def _mounts(cluster: ClusterConfig, folders: Sequence[Path]) -> str:
    given = [mount if ":" in mount else f"{mount}:{mount}" for mount in cluster.mounts]
    return ",".join(dict.fromkeys([*(f"{folder}:{folder}" for folder in folders), *given]))
