"""The `avcil` command. Its subcommands import what they need when they run, so that --help is immediate."""

import sys
from typing import Any

import click

import avcil_dist
from avcil_dist.errors import AvcilError, StepStopped
from avcil_dist.exit_codes import INTERRUPTED, STOPPED, USER_ERROR
from avcil_dist.system.signals import interrupted_once
from launch.cli.attention import attention
from launch.cli.bench import bench
from launch.cli.compare import compare
from launch.cli.config import config
from launch.cli.data import data
from launch.cli.doctor import doctor, doctor_ranks
from launch.cli.evaluate import evaluate
from launch.cli.export import export
from launch.cli.jobs import cancel, logs, status, submit
from launch.cli.output import echo_error, prepare_output
from launch.cli.predict import predict
from launch.cli.report import report
from launch.cli.reproduce import reproduce
from launch.cli.sandbox import sandbox
from launch.cli.shards import shards
from launch.cli.sweep import methods, sweep
from launch.cli.tracking import resume, sync
from launch.cli.train import train
from launch.cli.weights import weights


class _Commands(click.Group):
    """Command group that prints the project's own errors as one line, and leaves the traceback to bugs."""

    def invoke(self, context: click.Context) -> Any:
        with interrupted_once():
            try:
                prepare_output()
                return super().invoke(context)
            except click.NoSuchOption as error:
                raise _with_setting(error) from None
            except AvcilError as error:
                echo_error(str(error))
                sys.exit(USER_ERROR)
            except KeyboardInterrupt as interrupt:
                echo_error("; ".join(filter(None, ("interrupted", *interrupt.args))))
                sys.exit(INTERRUPTED)
            except StepStopped as stopped:
                echo_error(str(stopped))
                sys.exit(STOPPED)


def _with_setting(error: click.NoSuchOption) -> click.UsageError:
    """Return the error with the setting of that name, where a command that takes settings got it as an option."""
    if error.ctx is None or not any("KEY=VALUE" in str(argument.metavar) for argument in error.ctx.command.params):
        return error
    from avcil_dist.config.fields import keys_in
    from avcil_dist.config.loader import NAMED_SECTIONS
    from avcil_dist.config.schema import Config

    name = error.option_name.lstrip("-").replace("-", "_")
    found = [key for key in (*NAMED_SECTIONS, *keys_in(Config)) if name in (key, key.rpartition(".")[2])]
    if len(found) != 1:
        return error
    line = f"No such option {error.option_name!r}. It is a setting, without dashes: {found[0]}=VALUE"
    return click.UsageError(line, error.ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(avcil_dist.__version__)
def cli() -> None:
    """Audio-visual class-incremental learning: build shards, train streams of steps, compare them.

    \b
    A first round trip on a laptop:
      avcil shards synth clips                 render labelled videos
      avcil shards build clips shards          pack them into WebDataset shards
      avcil train demo data.manifest=shards/manifest.json
      avcil report runs                        tables, and a page with plots
    """


for _command in (
    attention,
    bench,
    cancel,
    compare,
    config,
    data,
    evaluate,
    export,
    logs,
    methods,
    report,
    resume,
    sandbox,
    shards,
):
    cli.add_command(_command)
for _command in (doctor, doctor_ranks, predict, reproduce, status, submit, sweep, sync, train, weights):
    cli.add_command(_command)
