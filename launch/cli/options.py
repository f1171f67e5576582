"""Options and arguments that several commands share."""

import os
from collections.abc import Callable, Sequence

import click

from avcil_dist.errors import ConfigError
from avcil_dist.system.log import VARIABLE, Level

CLUSTER_PREFIX = "cluster."


def resume_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `ResumePolicy` to a command."""
    options = (
        click.option("--restart", is_flag=True, help="Delete the stream's committed steps and begin at step 0."),
        click.option("--restart-step", is_flag=True, help="Delete the snapshots of the next step and begin it again."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def predicted_clips_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a step and of the clips that it predicts: step, split, manifest, modality, device."""
    options = (
        click.option(
            "--step", type=click.IntRange(0), help="The step whose weights predict; default: the last committed."
        ),
        click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True),
        click.option("--manifest", help="Manifest of other shards than those that the step was trained on."),
        click.option(
            "--modality", type=click.Choice(["audio", "visual"]), help="Predict from sound, or from pictures, alone."
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cuda", "cpu"]),
            default="auto",
            show_default=True,
            help="As engine.device.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `-v` and `-q`, which select the level of the log of this command and of the processes that it starts."""

    def choose(level: Level) -> Callable[[click.Context, click.Parameter, bool], None]:
        def callback(_: click.Context, __: click.Parameter, is_given: bool) -> None:
            if is_given:
                os.environ[VARIABLE] = level

        return callback

    verbose = click.option(
        "--verbose",
        "-v",
        is_flag=True,
        expose_value=False,
        callback=choose("debug"),
        help="Also log the values of single iterations.",
    )
    quiet = click.option(
        "--quiet", "-q", is_flag=True, expose_value=False, callback=choose("warning"), help="Log warnings only."
    )
    return verbose(quiet(command))


def processes_option(description: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add `--processes`; its value is None where it was not given, which a launcher around the command permits."""
    return click.option("--processes", "-n", type=click.IntRange(1), help=f"{description}  [default: 1]")


def grid_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of commands that train many streams: `--processes`, `--parallel`, `--cluster`."""
    options = (
        processes_option("Processes (ranks) of each stream."),
        click.option(
            "--parallel",
            type=click.IntRange(1),
            default=1,
            metavar="N",
            help="N streams at a time on this machine, which share its cores and GPUs.",
        ),
        click.option(
            "--cluster",
            help="Submit each stream as a chain of jobs; a cluster file, or a shipped one: slurm, local.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def smoke_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--smoke`."""
    return click.option(
        "--smoke",
        is_flag=True,
        help="Run two iterations of each step through the whole chain, on a few clips of each class, into the folder "
        "`smoke` of the output folder: to see that all of it works. An earlier smoke run is replaced.",
    )(command)


def split_words(words: Sequence[str], cluster: str | None) -> tuple[list[str], list[str]]:
    """Separate the settings of the stream from those of the cluster file, which are returned without their prefix.

    Raises ConfigError for settings of a cluster file where none is given.
    """
    of_cluster = [word.removeprefix(CLUSTER_PREFIX) for word in words if word.startswith(CLUSTER_PREFIX)]
    if of_cluster and cluster is None:
        raise ConfigError(f"{CLUSTER_PREFIX}{of_cluster[0]}: it changes a cluster file; give one with --cluster")
    return [word for word in words if not word.startswith(CLUSTER_PREFIX)], of_cluster
