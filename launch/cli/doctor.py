"""Command `avcil doctor`, and the hidden commands of its job."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.cli.options import split_words
from launch.cli.output import echo, echo_list, interrupt_note

if TYPE_CHECKING:
    from launch.doctor.findings import Finding

FAULT = 1


@click.command()
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config", "name", help="A configuration, whose servers, data and output folder are looked at.")
@click.option("--cluster", help="Also measure all-reduce between the nodes of this cluster file, in a job.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(words: tuple[str, ...], name: str | None, cluster: str | None, as_json: bool) -> None:
    """Check this machine, and with --cluster the nodes: one line for each finding; a cross states what to do.

    Looked at are driver, CUDA, NCCL, compiler, DeepSpeed, codecs, `flock` on the disk of the output, TMPDIR, /dev/shm,
    the hub, MLflow and S3 as configured, and the clock against that of a server. The exit code is 0 without a cross
    and 1 with one; a hub that does not answer is none. KEY=VALUE changes a setting of --config, cluster.KEY=VALUE one
    of the cluster file.

    \b
    Examples:
      avcil doctor
      avcil doctor --config vs100_ci output=/scratch/runs tracking.uri=http://tracking:5000
      avcil doctor --cluster slurm cluster.nodes=2 cluster.gpus_per_node=8
    """
    from avcil_dist.compose import load_config
    from launch.doctor.probes import diagnose

    settings, of_cluster = split_words(words, cluster)
    config = load_config(name or "demo", settings) if name or settings else None
    output = config.output if config else "runs"
    found = diagnose(config, output, os.environ)
    if cluster is not None:
        found.append(_all_reduce(cluster, of_cluster, output))
    if as_json:
        echo(json.dumps([asdict(finding) for finding in found], indent=1))
    else:
        echo_list("\n".join(finding.line() for finding in found), indent=15)
    if any(finding.state == "fault" for finding in found):
        sys.exit(FAULT)


def _all_reduce(cluster: str, of_cluster: list[str], output: str) -> "Finding":
    from launch.cluster.resources import load_cluster
    from launch.cluster.schedulers.base import scheduler_of
    from launch.doctor.cluster_check import check_cluster, plan_check

    resources = load_cluster(cluster, of_cluster)
    work = plan_check(resources, output)
    nodes = f"{resources.nodes} node{'s' * (resources.nodes > 1)}"
    echo(f"{work.folder}: a job of {nodes} measures all-reduce; Ctrl-C ends the waiting", err=True)
    with interrupt_note(f"to end the job: {scheduler_of(resources.kind).cancel_command(work)}"):
        return check_cluster(resources, work, lambda: None)


@click.group(name="doctor-ranks", hidden=True)
def doctor_ranks() -> None:
    """Commands of the job of `avcil doctor --cluster`."""


@doctor_ranks.command()
@click.option("--part", required=True, help="The part, which is the only one.")
@click.argument("folder")
def reduce(part: str, folder: str) -> None:
    """Measure all-reduce on the rank that the environment names; rank 0 writes the result to FOLDER."""
    from launch.doctor.cluster_check import measure_all_reduce
    from launch.local_worlds import current_world

    measure_all_reduce(current_world(), folder)


@doctor_ranks.command()
@click.argument("folder")
def show(folder: str) -> None:
    """Print the result in FOLDER."""
    from launch.doctor.cluster_check import RESULT

    echo(Path(folder, RESULT).read_text())
