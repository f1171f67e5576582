"""Options and work of the `avcil shards` commands that build by parts on a cluster."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from avcil_dist.errors import ConfigError
from launch.cli.count_bar import CountBar
from launch.cli.options import split_words
from launch.cli.output import echo, interrupt_note

if TYPE_CHECKING:
    from data_shards.build_plan import BuildReport

OWN_PARAMETERS = ("cluster", "parts", "dry_run", "part", "strict", "words", "overrides")


@dataclass(frozen=True)
class ClusterJobs:
    """Values of `cluster_options`."""

    cluster: str
    parts: int
    dry_run: bool


def cluster_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a build on a cluster to a command, which receives them as `jobs`; None without a cluster."""

    @wraps(command)
    def with_jobs(*, cluster: str | None, parts: int | None, dry_run: bool, **values: Any) -> None:
        command(jobs=_cluster_jobs(cluster, parts, dry_run, values["part"]), **values)

    options = (
        click.option("--cluster", help="Run on a cluster: a cluster file, or a shipped one: slurm, local."),
        click.option("--parts", type=click.IntRange(1), help="Number of parts, and of jobs, with --cluster."),
        click.option("--dry-run", is_flag=True, help="With --cluster: print the job scripts; submit nothing."),
    )
    decorated: Callable[..., None] = with_jobs
    for option in reversed(options):
        decorated = option(decorated)
    return decorated


def _cluster_jobs(cluster: str | None, parts: int | None, dry_run: bool, part: str | None) -> ClusterJobs | None:
    """The values of the options. Raises ConfigError for those that contradict each other."""
    if cluster is None:
        if parts is not None or dry_run:
            raise ConfigError("--parts and --dry-run belong to --cluster; a single part is --part I/N")
        return None
    if part is not None:
        raise ConfigError("--part is one part on this machine; with --cluster give the number of all parts: --parts N")
    if parts is None:
        raise ConfigError("--cluster: give the number of parts, and of jobs: --parts N")
    return ClusterJobs(cluster, parts, dry_run)


def is_built(output: str) -> bool:
    """Whether there is a data set in `output`; then no job is needed."""
    from avcil_dist import storage
    from data_shards.build_plan import MANIFEST

    return storage.exists(storage.join(output, MANIFEST))


def run_on_cluster(
    jobs: ClusterJobs, output: str, *, title: str, strict: bool, words: Sequence[str] = (), by_rank: bool = False
) -> "BuildReport | None":
    """Submit the current command by parts, show its progress, and return its report; None for a dry run.

    `words`: settings, those of the cluster file with the prefix `cluster.`. `by_rank`: a part has a process for each
    task of the cluster file. Jobs that wait or run are kept. Ctrl-C ends this process only.
    """
    from data_shards.build_plan import merge_parts
    from launch.cluster.parts import plan_parts, submit_parts, wait_for_parts
    from launch.cluster.resources import load_cluster
    from launch.cluster.schedulers.base import scheduler_of

    settings, of_cluster = split_words(words, jobs.cluster)
    resources = load_cluster(jobs.cluster, of_cluster)
    command = _command(click.get_current_context(), settings, resources.cpus_per_task * resources.tasks)
    ranks = resources.tasks if by_rank else 1
    work = plan_parts(output, resources, jobs.parts, command, strict=strict, ranks=ranks)
    scheduler = scheduler_of(resources.kind)
    if jobs.dry_run:
        echo(scheduler.parts_script(resources, work))
        return None
    is_new = submit_parts(resources, work)
    end = scheduler.cancel_command(work)
    with interrupt_note(f"the jobs run on. The same command shows them again. To end them: {end}"):
        echo(f"{work.folder}: {jobs.parts} parts {'submitted' if is_new else 'wait or run already'}", err=True)
        with CountBar(title) as bar:
            wait_for_parts(output, work, bar.show)
    return replace(merge_parts(output), unchanged=False)


def _command(context: click.Context, settings: Sequence[str], processes: int) -> list[str]:
    """The words of the current command for one of its parts, without the options of a cluster."""
    options, arguments = list[str](), list[str]()
    for parameter in context.command.params:
        name = parameter.name or ""
        value = context.params.get(name)
        if name in OWN_PARAMETERS:
            continue
        if isinstance(parameter, click.Argument):
            arguments += map(str, value if isinstance(value, tuple) else (value,))
        elif name == "processes" and context.get_parameter_source(name) != ParameterSource.COMMANDLINE:
            options += ["--processes", str(processes)]  # the cores of a part, not those of this machine
        elif context.get_parameter_source(name) == ParameterSource.COMMANDLINE and value is not False:
            option = max(parameter.opts, key=len)
            options += [option] if value is True else [option, str(value)]
    return ["shards", context.info_name or "", *options, "--", *arguments, *settings]
