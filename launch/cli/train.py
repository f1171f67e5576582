"""Commands `avcil train` and `avcil eval`."""

import json
from typing import cast

import click

from launch.cli.options import processes_option, resume_options
from launch.cli.output import echo_once


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@processes_option("Processes (ranks) on this machine.")
@resume_options
def train(
    config: str,
    overrides: tuple[str, ...],
    processes: int | None,
    restart: bool,
    restart_step: bool,
    reset_optimizer: bool,
) -> None:
    """Train all steps of the stream of CONFIG.

    CONFIG is a yaml file or the name of a shipped one. The same command continues an interrupted
    stream: committed steps are skipped, and the next step continues from its newest snapshot.
    SIGTERM and SIGUSR2 stop it with a snapshot and exit code 143. Under torchrun, srun or mpirun
    each process is one rank, without --processes.

    \b
    Examples:
      avcil train demo --processes 2
      avcil train demo method=finetune optim.lr=3e-4 seed=1
      torchrun --nproc-per-node 8 --no-python avcil train my.yaml engine=zero2
    """
    from avcil_dist.compose import load_config
    from launch.local import run_stream
    from launch.resume_policy import ResumePolicy

    resolved = load_config(config, overrides)
    stream = run_stream(resolved, processes=processes, policy=ResumePolicy(restart, restart_step, reset_optimizer))
    echo_once(f"{stream}: all steps are committed; see them with: avcil report {stream}")


@click.command(name="eval")
@click.argument("stream")
@click.option("--step", type=int, help="The step whose weights are evaluated; default: the last committed.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True)
@click.option("--manifest", help="Manifest of other shards than those that the step was trained on.")
@click.option("--missing", type=click.Choice(["audio", "visual"]), help="Predict without sound, or without pictures.")
@click.option(
    "--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True, help="As engine.device."
)
def evaluate(stream: str, step: int | None, split: str, manifest: str | None, missing: str | None, device: str) -> None:
    """Evaluate a committed step of STREAM (a folder such as runs/demo/demo-avcil-seed0) again.

    Prints seen accuracy, accuracy per task and accuracy per class as JSON. With --missing the method predicts from the
    other modality alone; those with a head from sums over clips can (analytic, ncm, slda).
    """
    from avcil_dist.data.manifest import Split
    from avcil_dist.inference.predict import Modality, evaluate_step
    from avcil_dist.training.device import DeviceSetting
    from launch.local_worlds import current_world

    results = evaluate_step(
        stream,
        step,
        cast(Split, split),
        manifest,
        world=current_world(),
        missing=cast(Modality | None, missing),
        device_setting=cast(DeviceSetting, device),
    )
    echo_once(json.dumps(results, indent=1))
