"""Jobs in containers: the commands of ranks, of the end of a job, of builds by parts; the files that make an image."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from avcil_dist.errors import ConfigError
from launch.cluster.part_jobs import PartJobs
from launch.cluster.resources import ClusterConfig, load_cluster
from launch.cluster.schedulers.base import scheduler_of
from launch.cluster.schedulers.slurm_parts import array_text, merge_text
from launch.cluster.schedulers.slurm_script import rank_command, sbatch_parameters, sbatch_text

PROJECT = Path(__file__).parents[2]
STREAM = "/shared/my runs/demo"
SIF = ClusterConfig(
    kind="slurm", gpus_per_node=4, container="/shared/avcil.sif", mounts=["/data", "/scratch/shards:/shards:ro"]
)
MOUNTS = f"{STREAM}:{STREAM},/data:/data,/scratch/shards:/shards:ro"


def commands(cluster: ClusterConfig) -> tuple[list[str], list[str]]:
    """The words of the ranks' srun, and those of Python at the end of the job."""
    parameters = sbatch_parameters(
        cluster, 2, name="s02", code=None, prefix=f"{STREAM}/jobs/step_002", python="/venv/bin/python", dependency=None
    )
    folder = f"{STREAM}/jobs/step_002"
    ranks = rank_command(cluster, "/venv/bin/python", f"{STREAM}/jobs", folder, "0a.pkl")
    lines = sbatch_text(parameters, folder=folder, command=ranks).replace("\\\n", "").splitlines()
    [srun] = [line for line in lines if "launch.cluster.rank_main" in line]
    [end] = [line for line in lines if "launch.cluster.mark_failed" in line]
    return shlex.split(srun), shlex.split(end)


def test_apptainer_starts_the_ranks_and_the_end_with_gpus_and_folders() -> None:
    srun, end = commands(SIF)
    start = ["apptainer", "exec", "--nv", "--bind", MOUNTS, "/shared/avcil.sif", "python"]
    rank = ["-u", "-m", "launch.cluster.rank_main", f"{STREAM}/jobs/step_002", "0a.pkl"]
    assert srun[-len(start + rank) :] == start + rank
    assert end[: len(start)] == start
    assert not any(word.startswith("--container") for word in srun)
    assert "--nv" not in commands(ClusterConfig(kind="slurm", container="docker://lab/avcil:1"))[0]


def test_pyxis_gets_the_image_from_srun() -> None:
    cluster = SIF.model_copy(update={"container": "registry#lab/avcil:1", "python": "/opt/conda/bin/python"})
    srun, end = commands(cluster)
    pyxis = ["--container-image=registry#lab/avcil:1", f"--container-mounts={MOUNTS}"]
    command = srun.index("/opt/conda/bin/python")
    assert srun[command - 2 : command] == pyxis
    assert srun[command + 1 : command + 4] == ["-u", "-m", "launch.cluster.rank_main"]
    assert end[:6] == ["srun", "--nodes=1", "--ntasks=1", "--export=ALL", *pyxis]
    assert end[6] == "/opt/conda/bin/python"


def test_without_a_container_another_interpreter_may_be_named() -> None:
    srun, end = commands(ClusterConfig(kind="slurm", python="/my envs/bin/python"))
    assert srun[srun.index("-u") - 1] == end[0] == "/my envs/bin/python"


def test_a_build_by_parts_runs_in_the_container() -> None:
    build, merge = ("shards", "build", "clips.csv"), ("shards", "merge")
    work = PartJobs("slurm", "/shared/build", 3, build, merge, None, "/projects/lab", 1)
    bind = "/shared/build:/shared/build,/projects/lab:/projects/lab,/data:/data"
    start = f"apptainer exec --bind {bind} image.sif python -m avcil_dist shards"
    cluster = ClusterConfig(kind="slurm", container="image.sif", mounts=["/data"])
    assert f"\n{start} build --part" in array_text(cluster, work)
    assert f"\n{start} merge &" in merge_text(cluster, work, "7")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mounts=[/data]"], "mounts are those of a container"),
        (["container=a b"], "container"),
        (["container=--nv"], "container"),
        (["container=a.sif", "mounts=[data]"], "mounts"),
        (["container=a.sif", "mounts=['/a:/b,/c']"], "mounts"),
        (["container=a.sif", "mounts=['/a:/b:rx']"], "mounts"),
    ],
)
def test_what_no_runtime_takes_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_cluster("slurm", words)


def test_jobs_of_this_machine_have_no_container() -> None:
    cluster = load_cluster("local", ["container=a.sif"])
    with pytest.raises(ConfigError, match="container: kind: local runs jobs with this Python"):
        scheduler_of("local").check(cluster)


def test_images_have_the_tested_versions_and_all_that_the_package_is_made_of() -> None:
    needed = ["avcil_dist", "configs", "data_shards", "launch", "LICENSE", "README.md", "pyproject.toml"]
    needed += ["requirements.lock", "setup.py"]
    definition = (PROJECT / "avcil.def").read_text()
    assert re.findall(r"^    (\S+) /opt/avcil-dist/\1$", definition, re.MULTILINE) == needed
    assert re.findall(r"^!(\S+)$", (PROJECT / ".dockerignore").read_text(), re.MULTILINE) == needed
    locked = "python /opt/avcil-dist/launch/lock.py s3,gs,az,hdf5,gpu,tensorboard > /opt/requirements.txt"
    for text in (definition, (PROJECT / "Dockerfile").read_text()):
        assert locked in text
        assert "--require-hashes --no-deps --requirement /opt/requirements.txt" in text
        assert "--no-deps /opt/avcil-dist" in text


def test_the_workflow_runs_the_fast_tests_with_the_lowest_and_the_newest_versions() -> None:
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "tests.yml").read_text())
    jobs = workflow["jobs"]
    versions = {name: job.get("env") for name, job in jobs.items()}
    pythons = re.findall(r"Python :: (3\.\d+)", (PROJECT / "setup.py").read_text())
    assert [job["steps"][1]["with"]["python-version"] for job in jobs.values()] == [pythons[0], pythons[-1]]
    assert versions == {name: {"AVCIL_VERSIONS": name} for name in ("lowest", "newest")}
    for job in jobs.values():
        assert "bash launch/test.sh -m fast" in [step.get("run") for step in job["steps"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("versions", "wanted"),
    [
        (None, "--require-hashes"),
        ("tested", "--require-hashes"),
        ("lowest", "--constraint"),
        ("newest", "--upgrade"),
        ("old", None),
    ],
)
def test_the_environment_has_the_versions_that_are_wanted(
    versions: str | None, wanted: str | None, tmp_path: Path
) -> None:
    python = tmp_path / ".venv" / "bin" / "python"
    (tmp_path / "launch").mkdir()
    python.parent.mkdir(parents=True)
    for name in ("launch/environment.sh", "setup.py", "constraints.txt", "requirements.lock"):
        (tmp_path / name).write_text((PROJECT / name).read_text())
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o700)
    environment = {"PATH": "/usr/bin:/bin"} | ({"AVCIL_VERSIONS": versions} if versions else {})
    script = f". {tmp_path}/launch/environment.sh; ensure_environment '[test]'"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == (0 if wanted else 2), done.stderr
    assert (wanted or "give tested, lowest or newest") in done.stdout + done.stderr
