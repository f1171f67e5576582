"""The `avcil` command. Thin: words in, calls out, an AvcilError as one line and exit code 2."""

import sys
from typing import Any, cast

import click

import avcil_dist
from avcil_dist.errors import AvcilError, StepStopped
from avcil_dist.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from launch.cli.bench import bench
from launch.cli.experiments import compare, methods, sweep
from launch.cli.jobs import cancel, logs, resume_options, status, submit
from launch.cli.sandbox import sandbox
from launch.cli.shards import shards
from launch.cli.tracking import resume, sync


class _Commands(click.Group):
    """A group whose users see no traceback for what is not our bug."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except AvcilError as error:
            click.echo(f"avcil: {error}", err=True)
            sys.exit(USER_ERROR)
        except KeyboardInterrupt:
            click.echo("avcil: interrupted; the same command continues from the last snapshot", err=True)
            sys.exit(INTERRUPTED)
        except StepStopped as stopped:
            click.echo(f"avcil: {stopped}", err=True)
            sys.exit(STOPPED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(avcil_dist.__version__)
def cli() -> None:
    """Audio-visual class-incremental learning: make shards, train streams of steps, compare them.

    \b
    A first round trip on a laptop:
      avcil shards synth clips                 render labelled videos
      avcil shards build clips shards          pack them into WebDataset shards
      avcil train demo data.manifest=shards/manifest.json
      avcil report runs                        tables, and a page with plots
    """


for _command in (shards, methods, sweep, compare, submit, status, cancel, logs, resume, sync, sandbox, bench):
    cli.add_command(_command)


@cli.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--processes", "-n", default=1, show_default=True, help="Processes (ranks) on this machine.")
@resume_options
def train(
    config: str,
    overrides: tuple[str, ...],
    processes: int,
    restart: bool,
    restart_step: bool,
    reset_optimizer: bool,
) -> None:
    """Train the whole stream of CONFIG, step after step.

    CONFIG is a yaml file or the name of a shipped one. The same command continues an interrupted
    stream: steps that are committed are not done again, and a step that was begun goes on from its
    newest snapshot. SIGTERM and SIGUSR2 stop it with a snapshot, and exit code 143. Under torchrun
    or srun each process is one rank and --processes is not used.

    \b
    Examples:
      avcil train demo --processes 2
      avcil train demo method=finetune optim.lr=3e-4 seed=1
      torchrun --nproc-per-node 8 -m launch train my.yaml engine=zero2
    """
    from avcil_dist.compose import load_config
    from launch.local import run_stream
    from launch.resume_policy import ResumePolicy

    if processes < 1:
        raise click.BadParameter("at least 1", param_hint="--processes")
    resolved = load_config(config, overrides)
    stream = run_stream(resolved, processes=processes, policy=ResumePolicy(restart, restart_step, reset_optimizer))
    click.echo(f"{stream}: all steps are committed; see them with: avcil report {stream}")


@cli.command(name="eval")
@click.argument("stream")
@click.option("--step", type=int, help="Which step's weights; default: the last committed.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--manifest", help="Other shards than those that the step was trained on.")
def evaluate(stream: str, step: int | None, split: str, manifest: str | None) -> None:
    """Evaluate a committed step of STREAM (a folder such as runs/demo/demo-avcil-seed0) once more.

    Prints seen accuracy, accuracy by task and by class as JSON.
    """
    import json

    from avcil_dist.data.manifest import Split
    from avcil_dist.inference import evaluate_step
    from launch.local import current_world

    world = current_world()
    click.echo(json.dumps(evaluate_step(stream, step, cast(Split, split), manifest, world=world), indent=1))


@cli.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--page", type=click.Path(dir_okay=False), help="Also write an HTML page with plots to this file.")
def report(folders: tuple[str, ...], page: str | None) -> None:
    """Show streams side by side: accuracies, the accuracy matrix, forgetting.

    FOLDER is a stream's folder, or one that holds several.
    """
    from rich.console import Console

    from avcil_dist.reporting.report import load_streams, print_report, write_page

    streams = load_streams(folders)
    print_report(streams, Console())
    if page:
        write_page(streams, page)
        click.echo(f"wrote {page}")


@cli.group()
def config() -> None:
    """Look at configurations."""


@config.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Print the configuration that NAME and the overrides resolve to."""
    from avcil_dist.compose import load_config
    from avcil_dist.config.serialization import config_to_yaml

    click.echo(config_to_yaml(load_config(name, overrides)), nl=False)


@config.command()
@click.option("--markdown", is_flag=True, help="Print the page docs/configuration.md.")
def keys(markdown: bool) -> None:
    """Print all settings: key, type, default, class of change and description."""
    from avcil_dist.compose import method_options
    from avcil_dist.config.reference import markdown_reference, text_reference

    click.echo((markdown_reference if markdown else text_reference)(method_options()), nl=False)
