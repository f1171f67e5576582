"""Commands on what a tracking server holds, or should hold, of a stream: `resume`, `sync`."""

import click


@click.command()
@click.argument("run")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--from-step", type=click.IntRange(min=0), help="Go on after this step; default: the last committed.")
@click.option("--fork", is_flag=True, help="Go on in a new run, which records where it came from.")
@click.option("--force", is_flag=True, help="Allow changes that make steps incomparable; this is recorded.")
@click.option("--processes", "-n", default=1, show_default=True, help="Processes (ranks) on this machine.")
@click.option("--cluster", help="A cluster's file or shipped name: go on as a chain of jobs there.")
@click.option(
    "--uri",
    envvar="MLFLOW_TRACKING_URI",
    help="Tracking server or database; default: MLFLOW_TRACKING_URI, else the database in ./runs.",
)
def resume(
    run: str,
    overrides: tuple[str, ...],
    from_step: int | None,
    fork: bool,
    force: bool,
    processes: int,
    cluster: str | None,
    uri: str | None,
) -> None:
    """Go on with the stream of RUN from what MLflow holds of it: on any machine that sees server and shards.

    RUN is the id or name of a stream's run. The last committed step is downloaded, each file held against its
    digest, and the stream goes on after it in the same run. Settings are those that it was made with: say output=
    and data.manifest= where this machine has other paths. Other changes are shown; those that make another stream
    of it need --fork, those that make its steps incomparable need --force.

    \b
    Examples:
      avcil resume demo-avcil-seed0 --uri http://tracking:5000 output=runs data.manifest=shards/manifest.json
      avcil resume 0a1b2c… --from-step 1 --fork optim.lr=3e-4
      avcil resume demo-avcil-seed0 --cluster my-cluster.yaml output=runs cluster.nodes=2
    """
    from avcil_dist.config.schema import TrackingConfig
    from avcil_dist.tracking.client import tracking_uri, with_uri
    from avcil_dist.tracking.resume import ResumeRequest, prepare
    from launch.cli.jobs import split_words
    from launch.local import run_stream

    if processes < 1:
        raise click.BadParameter("at least 1", param_hint="--processes")
    place = tracking_uri(with_uri(TrackingConfig(), uri), "runs")
    settings, of_cluster = split_words(overrides, cluster)
    ready = prepare(place, run, ResumeRequest(tuple(settings), from_step, fork, force))
    click.echo(f"{ready.config.stream_name}: goes on after step {ready.step}", err=True)
    if cluster:
        from launch.cluster.chain import submit_stream
        from launch.cluster.resources import load_cluster

        submitted = submit_stream(ready.config, load_cluster(cluster, of_cluster))
        click.echo(f"{submitted.stream}: {len(submitted.new)} submitted; see it with: avcil status {submitted.stream}")
        return
    stream = run_stream(ready.config, processes=processes)
    click.echo(f"{stream}: all steps are committed; see them with: avcil report {stream}")


@click.command()
@click.argument("streams", nargs=-1, required=True, metavar="STREAM...")
@click.option("--uri", help="Tell this server or database, which need not be the stream's own.")
@click.option("--again", is_flag=True, help="Tell everything from the beginning; what is there is not doubled.")
def sync(streams: tuple[str, ...], uri: str | None, again: bool) -> None:
    """Tell the tracking server what it has not been told of a stream, when it was away as the stream ran.

    STREAM is a stream's folder, such as runs/demo-avcil-seed0.
    """
    from avcil_dist.tracking.client import shown
    from avcil_dist.tracking.session import sync_stream

    for stream in streams:
        click.echo(f"{stream}: {shown(sync_stream(stream, uri=uri, again=again))} has been told everything")
