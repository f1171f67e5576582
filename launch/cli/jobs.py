"""Commands on chains of jobs: `submit`, `status`, `cancel`, `logs`."""

from collections.abc import Callable, Sequence

import click

from avcil_dist.errors import ConfigError

CLUSTER_PREFIX = "cluster."


def resume_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of a command that say what a stream does not go on from."""
    options = (
        click.option("--restart", is_flag=True, help="Remove the stream's committed steps and begin at step 0."),
        click.option(
            "--restart-step", is_flag=True, help="Remove the snapshots of the step that is next and begin it anew."
        ),
        click.option("--reset-optimizer", is_flag=True, help="Go on from the snapshot, with a fresh optimizer."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@click.argument("config")
@click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--cluster", required=True, help="A cluster file, or a shipped one: slurm, local.")
@click.option("--dry-run", is_flag=True, help="Print the scripts that sbatch would be given; submit nothing.")
@resume_options
def submit(
    config: str,
    words: tuple[str, ...],
    cluster: str,
    dry_run: bool,
    restart: bool,
    restart_step: bool,
    reset_optimizer: bool,
) -> None:
    """Submit the stream of CONFIG: a SLURM job for each step, each after the one before it succeeded.

    One task of a job is one rank. Code and settings are those of this moment, however long the jobs
    wait. A job that is preempted, loses a node or runs out of time is requeued and goes on from its
    last snapshot; one that fails for good ends the chain. Submitted again, committed steps are
    skipped and jobs that wait or run are kept. cluster.KEY=VALUE changes the cluster file's settings.

    \b
    Examples:
      avcil submit vs100_ci --cluster my-cluster.yaml
      avcil submit my.yaml seed=1 --cluster slurm cluster.nodes=2 cluster.gpus_per_node=8 cluster.partition=gpu
      avcil submit demo --cluster local
    """
    from avcil_dist.compose import load_config
    from launch.cluster.chain import script_texts, submit_stream
    from launch.cluster.resources import load_cluster
    from launch.resume_policy import ResumePolicy

    settings, of_cluster = split_words(words, cluster)
    resolved, place = load_config(config, settings), load_cluster(cluster, of_cluster)
    if dry_run:
        for step, text in script_texts(resolved, place).items():
            click.echo(f"### step {step}\n{text}")
        return
    policy = ResumePolicy(restart, restart_step, reset_optimizer)
    done = submit_stream(resolved, place, policy=policy)
    if done.new and not done.chain.code:
        click.echo("avcil-dist is installed here, and jobs use it as it is: nothing to copy", err=True)
    for step in done.new:
        jobs = done.chain.jobs.get(step)
        click.echo(f"step {step}: {f'job {jobs[-1]}' if jobs else 'submitted'}")
    for step in done.kept:
        click.echo(f"step {step}: waits or runs already")
    if done.new or done.kept:
        click.echo(f"{done.stream}: see it with: avcil status {done.stream}")
    else:
        click.echo(f"{done.stream}: all steps are committed; see them with: avcil report {done.stream}")


@click.command()
@click.argument("run")
def status(run: str) -> None:
    """Show the steps of RUN (the stream's folder): SLURM's state, nodes, progress, accuracy, why one failed."""
    from rich.console import Console

    from launch.cluster.status import print_status

    print_status(run.rstrip("/"), Console())


@click.command()
@click.argument("run")
def cancel(run: str) -> None:
    """End the jobs of RUN (the stream's folder) that wait or run. Submitted again, it goes on."""
    from launch.cluster.status import cancel_chain

    count = cancel_chain(run.rstrip("/"))
    click.echo(f"{run}: {count} ended" if count else f"{run}: nothing waits or runs")


@click.command()
@click.argument("run")
@click.option("--step", type=int, required=True, help="The step whose newest job is meant.")
@click.option("--rank", type=int, default=0, show_default=True)
@click.option("--follow", "-f", is_flag=True, help="Go on until the job is over.")
def logs(run: str, step: int, rank: int, follow: bool) -> None:
    """Print the log of a step of RUN (the stream's folder)."""
    from launch.cluster.status import log_text

    for piece in log_text(run.rstrip("/"), step, rank, follow=follow):
        click.echo(piece, nl=False)


def split_words(words: Sequence[str], cluster: str | None) -> tuple[list[str], list[str]]:
    """The words about the stream, and those about the cluster without their prefix.

    Raises ConfigError for words about a cluster where none is given.
    """
    of_cluster = [word.removeprefix(CLUSTER_PREFIX) for word in words if word.startswith(CLUSTER_PREFIX)]
    if of_cluster and cluster is None:
        raise ConfigError(f"{CLUSTER_PREFIX}{of_cluster[0]}: it changes what --cluster gives, which is not there")
    return [word for word in words if not word.startswith(CLUSTER_PREFIX)], of_cluster


def submit_grid(
    config: str, settings: Sequence[str], cluster: str, of_cluster: Sequence[str], *, ablation: bool
) -> None:
    """Submit the streams of all combinations, each a chain, of which no more than `max_parallel` run at a time."""
    from launch.cluster.chain import submit_stream
    from launch.cluster.resources import load_cluster
    from launch.sweep import make_grid

    place = load_cluster(cluster, of_cluster)
    points = make_grid(config, settings, ablation=ablation, processes=place.world_size)
    last: list[str | None] = [None] * place.max_parallel
    for number, point in enumerate(points):
        lane = number % place.max_parallel  # its chains follow one another
        done = submit_stream(point.config, place, after=last[lane])
        last[lane] = done.last or last[lane]
        click.echo(f"{done.stream}: {len(done.new)} submitted, {len(done.kept)} wait or run already")
    click.echo(f"see one with: avcil status FOLDER; all, once they are done: avcil compare {points[0].config.output}")
