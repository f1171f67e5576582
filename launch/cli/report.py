"""Command `avcil report`: streams side by side, as tables and as a page."""

import click

from launch.cli.output import echo


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--page", type=click.Path(dir_okay=False), help="Also write an HTML page with plots to this file.")
def report(folders: tuple[str, ...], page: str | None) -> None:
    """Show streams side by side: accuracies, the accuracy matrix, forgetting.

    FOLDER is a stream's folder, or a folder of several streams.
    """
    from rich.console import Console

    from avcil_dist.reporting.report import load_streams, print_report

    streams = load_streams(folders)
    print_report(streams, Console())
    if page:
        from avcil_dist.reporting.page import write_page  # a second of imports

        write_page(streams, page)
        echo(f"wrote {page}")
