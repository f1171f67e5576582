"""Command `avcil report`: streams side by side, as tables and as a page."""

import click

from launch.cli.output import echo


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="FOLDER...")
@click.option("--page", type=click.Path(dir_okay=False), help="Also write an HTML page with plots to this file.")
@click.option(
    "--clips",
    type=click.IntRange(min=0, max=20),
    default=0,
    show_default=True,
    help="Test clips of the first task that the page shows, each with the evidence for its class after every step. "
    "Loads the weights and the clips; for streams that were trained on clips.",
)
def report(folders: tuple[str, ...], page: str | None, clips: int) -> None:
    """Show streams side by side: accuracies, the accuracy matrix, forgetting.

    FOLDER is a stream's folder, or a folder of several streams. On the page, streams that differ only in seed or class
    order are one row, with mean and standard deviation.
    """
    from rich.console import Console

    from avcil_dist.errors import ConfigError
    from avcil_dist.reporting.report import load_streams, print_report

    if clips and not page:
        raise ConfigError("--clips: they are shown on the page; give --page FILE too")
    streams = load_streams(folders)
    print_report(streams, Console())
    if page:
        from avcil_dist.reporting.page import write_page  # a second of imports
        from avcil_dist.tracking.links import tracked_at

        shown = []
        if clips:
            from launch.report_clips import report_clips  # seconds of imports

            shown = report_clips(streams, clips)
        links = {stream.folder: link for stream in streams if (link := tracked_at(stream.folder))}
        write_page(streams, page, shown, links)
        echo(f"wrote {page}")
