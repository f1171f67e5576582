"""Commands `avcil config …`: resolved configurations, and the reference of all settings."""

import click

from launch.cli.output import echo, echo_list


@click.group()
def config() -> None:
    """Show configurations and the reference of all settings."""


@config.command()
@click.argument("name")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def show(name: str, overrides: tuple[str, ...]) -> None:
    """Print the configuration that results from NAME and the overrides.

    NAME is a yaml file or the name of a shipped one.
    """
    from avcil_dist.compose import load_config
    from avcil_dist.config.serialization import config_to_yaml

    echo(config_to_yaml(load_config(name, overrides)), nl=False)


@config.command()
@click.option("--markdown", is_flag=True, help="Print the page docs/configuration.md.")
def keys(markdown: bool) -> None:
    """Print all settings: key, type, default, class of change and description."""
    from avcil_dist.config.method_options import METHOD_OPTIONS
    from avcil_dist.config.reference import markdown_reference, text_reference

    if markdown:
        echo(markdown_reference(METHOD_OPTIONS), nl=False)
    else:
        echo_list(text_reference(METHOD_OPTIONS).rstrip("\n"), indent=0)
