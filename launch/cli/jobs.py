"""Commands on chains of jobs: `submit`, `status`, `cancel`, `logs`."""

import shlex
import sys

import click

from avcil_dist.exit_codes import USER_ERROR
from launch.cli.options import log_options, resume_options, smoke_option, split_words
from launch.cli.output import echo, echo_error, interrupt_note


@click.command()
@click.argument("config")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", required=True, help="A cluster file, or a shipped one: slurm, local.")
@click.option("--dry-run", is_flag=True, help="Print a job script and the differences of the others; submit nothing.")
@smoke_option
@resume_options
@log_options
def submit(
    config: str,
    words: tuple[str, ...],
    cluster: str,
    dry_run: bool,
    smoke: bool,
    restart: bool,
    restart_step: bool,
) -> None:
    """Submit the stream of CONFIG as a chain of jobs: one for each step, each after the one before it succeeded.

    One task of a job is one rank. Jobs run the code and the settings of the submission, however long
    they wait. A job that is preempted, loses a node or reaches its time limit is requeued and
    continues from its last snapshot; a job that fails for good ends the chain. On another submission
    committed steps are skipped, and jobs that wait or run are kept. cluster.KEY=VALUE changes a
    setting of the cluster file.

    \b
    Examples:
      avcil submit vs100_ci --cluster my-cluster.yaml
      avcil submit my.yaml seed=1 --cluster slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.partition=gpu
      avcil submit demo --cluster local --smoke
    """
    from avcil_dist.compose import load_config
    from avcil_dist.streams.stream import stream_url
    from launch.cluster.chain import dry_run_text, kept_events_note, submit_stream
    from launch.cluster.resources import load_cluster
    from launch.resume_policy import ResumePolicy
    from launch.smoke import smoke_config

    settings, of_cluster = split_words(words, cluster)
    resolved, resources = load_config(config, settings), load_cluster(cluster, of_cluster)
    if smoke:
        resolved = smoke_config(resolved)
    note = kept_events_note(resolved, resources, stream_url(resolved))
    if dry_run:
        echo(dry_run_text(resolved, resources))
        if note:
            echo(note, err=True)
        return
    submission = submit_stream(resolved, resources, policy=ResumePolicy(restart or smoke, restart_step))
    chain, stream = submission.chain, submission.stream
    if submission.new and not chain.code:
        echo("avcil-dist is installed here; jobs run the installed package, no code is copied", err=True)
    if submission.new and note:
        echo(note, err=True)
    for step in submission.new:
        job = chain.newest_job(step)
        echo(f"step {step}: {f'job {job}' if job else 'submitted'}")
    for step in submission.kept:
        echo(f"step {step}: waits or runs already")
    if submission.new or submission.kept:
        echo(f"{stream}: see it with: avcil status {shlex.quote(stream)}")
    else:
        echo(f"{stream}: all steps are committed; see them with: avcil report {shlex.quote(stream)}")


@click.command()
@click.argument("run")
def status(run: str) -> None:
    """Show the steps of RUN, a stream's folder: state of the job, nodes, time, progress, accuracy, error.

    A stream that `avcil train` trains has no jobs: its committed steps are shown.
    RUN may also be a folder of streams, such as the output folder of a sweep: each stream below it is one row.
    """
    from rich.console import Console

    from launch.cluster.status_table import print_status

    print_status(run.rstrip("/") or "/", Console())


@click.command()
@click.argument("run")
def cancel(run: str) -> None:
    """End the jobs of RUN that wait or run, and wait for their end. A new submission continues.

    RUN is a stream's folder, or a folder of streams, such as the output folder of a sweep.
    """
    from launch.cluster.chain_record import has_chain
    from launch.cluster.status import cancel_chains, streams_below

    folder = run.rstrip("/") or "/"
    streams = [stream for stream in streams_below(folder) if has_chain(stream)] or [folder]
    ended, faults = cancel_chains(streams)
    for stream, count in ended.items():
        echo(f"{stream}: {count} ended" if count else f"{stream}: nothing waits or runs")
    for fault in faults:
        echo_error(str(fault))
    if faults:
        sys.exit(USER_ERROR)


@click.command()
@click.argument("run")
@click.option(
    "--step",
    type=click.IntRange(0),
    help="The step whose newest job is shown; default: the one that runs, else the last.",
)
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--follow/--no-follow",
    "-f",
    default=None,
    help="Print new lines until the job is over.  [default: for the step that runs]",
)
def logs(run: str, step: int | None, rank: int, follow: bool | None) -> None:
    """Print the log of a step of RUN (the stream's folder); that of the running step until its job is over.

    Ctrl-C ends the printing, not the job.
    """
    from launch.cluster.status import log_text, shown_step

    stream = run.rstrip("/") or "/"
    if step is None:
        current = shown_step(stream)
        step, follow = current.step, current.is_live if follow is None else follow
        echo(f"step {step}: {current.state}{f' ({current.reason})' if current.reason else ''}", err=True)
    with interrupt_note("the job runs on" if follow else ""):
        for piece in log_text(stream, step, rank, follow=bool(follow)):
            echo(piece, nl=False)
