"""Commands `resume` and `sync`: streams on a tracking server."""

import click

from launch.cli.options import log_options, processes_option, split_words
from launch.cli.output import CONTINUES_TRAINING, echo, echo_once, interrupt_note


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--from-step", type=click.IntRange(min=0), help="Continue after this step; default: the last committed.")
@click.option("--fork", is_flag=True, help="Continue in a new run, which records its origin.")
@click.option("--force", is_flag=True, help="Allow changes that make steps incomparable; they are recorded.")
@processes_option("Processes (ranks) on this machine.")
@click.option("--cluster", help="A cluster file or a shipped name: continue as a chain of jobs there.")
@click.option(
    "--uri",
    help="Tracking server or database; default: MLFLOW_TRACKING_URI, else the database in ./runs.",
)
@log_options
def resume(
    run: str,
    overrides: tuple[str, ...],
    from_step: int | None,
    fork: bool,
    force: bool,
    processes: int | None,
    cluster: str | None,
    uri: str | None,
) -> None:
    """Continue the stream of RUN from MLflow, on any machine that reaches the tracking server and the shards.

    RUN is the id or the name of a stream's run. The last committed step is downloaded and verified, and the stream
    continues after it in the same run. The settings are those of that step, but files go to runs unless output= names
    another folder. Give data.manifest= where this machine has the shards elsewhere. Other changes are listed. A change
    that makes another stream needs --fork, a change that makes the steps incomparable needs --force.

    \b
    Examples:
      avcil resume demo-avcil-seed0 --uri http://tracking:5000 output=runs data.manifest=shards/manifest.json
      avcil resume 0a1b2c… --from-step 1 --fork optim.lr=3e-4
      avcil resume demo-avcil-seed0 --cluster my-cluster.yaml output=runs cluster.nodes=2
    """
    from avcil_dist.config.schema import TrackingConfig
    from avcil_dist.tracking.resume import ResumeRequest, prepare_resume
    from avcil_dist.tracking.uris import tracking_uri, with_uri
    from launch.local import run_stream
    from launch.progress import print_warning

    server = tracking_uri(with_uri(TrackingConfig(), uri), "runs")
    settings, of_cluster = split_words(overrides, cluster)
    request = ResumeRequest(tuple(settings), from_step, fork, force)
    resumption = prepare_resume(server, run, request, show=print_warning)
    echo(f"{resumption.config.stream_name}: continues after step {resumption.step}", err=True)
    if cluster:
        from launch.cluster.chain import kept_events_note, submit_stream
        from launch.cluster.resources import load_cluster

        resources = load_cluster(cluster, of_cluster)
        submitted = submit_stream(resumption.config, resources)
        if note := kept_events_note(resumption.config, resources, submitted.stream):
            echo(note, err=True)
        echo(f"{submitted.stream}: {len(submitted.new)} submitted; see it with: avcil status {submitted.stream}")
        return
    with interrupt_note(CONTINUES_TRAINING if from_step is None else ""):
        stream = run_stream(resumption.config, processes=processes)
    echo_once(f"{stream}: all steps are committed; see them with: avcil report {stream}")


@click.command()
@click.argument("streams", nargs=-1, required=True, metavar="STREAM...")
@click.option("--uri", help="Send to this server or database; default: that of the stream.")
@click.option("--again", is_flag=True, help="Send all events from the first; the server keeps what it has.")
def sync(streams: tuple[str, ...], uri: str | None, again: bool) -> None:
    """Send unsent tracking events of a stream, such as after an outage of the tracking server.

    STREAM is a stream's folder, such as runs/demo-avcil-seed0, or a folder of streams, such as the output folder of a
    sweep.
    """
    from avcil_dist.tracking.delivery import sync_stream
    from launch.cluster.status import streams_below

    for stream in [found for folder in streams for found in streams_below(folder.rstrip("/")) or [folder]]:
        for synced in sync_stream(stream, uri=uri, again=again):
            refused = f", but {synced.rejected} events that it refused; see the warnings" if synced.rejected else ""
            echo(f"{stream}: everything is sent to {synced.server}{refused}")
