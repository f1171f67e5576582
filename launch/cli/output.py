"""Output of commands that a launcher runs once per rank."""

import os

import click

from avcil_dist.world import world_from_environment


def is_main_rank() -> bool:
    """Whether this process is rank 0 of its launcher, or has none."""
    return world_from_environment(os.environ).is_main


def echo_once(text: str) -> None:
    """Print a line on standard output, on rank 0 only: under torchrun or srun every rank runs the command."""
    if is_main_rank():
        click.echo(text)
