"""Commands `avcil sandbox up`, `down` and `status`: a SLURM on this machine."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from launch.cli.output import echo

if TYPE_CHECKING:
    from launch.sandbox.cluster import Sandbox

folder_option = click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of its files; default: avcil-sandbox in the cache folder (~/.cache).",
)


@click.group()
def sandbox() -> None:
    """Run a SLURM of two nodes with accounting on this machine (Debian, root), to try `avcil submit`.

    \b
      avcil sandbox up
      export SLURM_CONF=~/.cache/avcil-sandbox/slurm.conf
      avcil submit demo data.manifest=shards/manifest.json --cluster slurm cluster.nodes=2
      avcil sandbox down
    """


@sandbox.command()
@folder_option
def up(folder: Path | None) -> None:
    """Start all daemons that do not run yet."""
    found = _sandbox(folder)
    found.up()
    echo(found.run("sinfo", "--format=%P %a %D %T %N").stdout, nl=False)
    echo(f"To use it: export SLURM_CONF={found.conf}")


@sandbox.command()
@folder_option
def down(folder: Path | None) -> None:
    """Cancel all jobs and end all daemons; the files stay."""
    found = _sandbox(folder)
    found.down()
    echo(f"{found.folder}: nothing runs")


@sandbox.command()
@folder_option
def status(folder: Path | None) -> None:
    """Show the daemons, the nodes and the jobs. Exit code 1 unless all daemons run."""
    found = _sandbox(folder)
    daemons = found.status()
    for name, pid in daemons.items():
        echo(f"{name:22} {f'process {pid}' if pid else 'does not run'}")
    if None in daemons.values():
        raise SystemExit(1)
    echo(found.run("sinfo", "--Node", "--format=%N %P %T").stdout, nl=False)
    echo(found.run("squeue", "--format=%i %j %T %N").stdout, nl=False)
    echo(f"To use it: export SLURM_CONF={found.conf}")


def _sandbox(folder: Path | None) -> "Sandbox":
    from launch.sandbox.cluster import Sandbox, default_folder

    return Sandbox((folder or default_folder()).expanduser().absolute())
