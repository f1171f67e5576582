"""Commands `avcil shards …`: build, import, verify and list shards. The work is done by the package `data_shards`."""

import click

from launch.cli.shards_build import build, features, merge, repack
from launch.cli.shards_check import list_shards, verify
from launch.cli.shards_import import import_features_, import_tars_, synth

SECTIONS = {
    "Build shards": (build, repack, merge, features),
    "Take shards and features of others": (import_tars_, import_features_),
    "Check": (list_shards, verify),
    "Render clips to try": (synth,),
}


class _Sections(click.Group):
    """Command group whose help lists the commands by `SECTIONS`."""

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands of each section with the first sentence of their help."""
        width = max(len(name) for name in self.commands)
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                limit = formatter.width - 6 - width
                rows = [(f"{command.name:{width}}", command.get_short_help_str(limit)) for command in commands]
                formatter.write_dl(rows)


@click.group(cls=_Sections)
def shards() -> None:
    """Build, import, verify and list the shards that training reads."""


for _commands in SECTIONS.values():
    for _command in _commands:
        shards.add_command(_command)
