"""Command `avcil train`."""

import click

from launch.cli.options import log_options, processes_option, resume_options, smoke_option
from launch.cli.output import CONTINUES_TRAINING, SMOKE_NOTE, echo_once, interrupt_note


@click.command()
@click.argument("config")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@processes_option("Processes (ranks) on this machine.")
@smoke_option
@resume_options
@log_options
def train(
    config: str,
    overrides: tuple[str, ...],
    processes: int | None,
    smoke: bool,
    restart: bool,
    restart_step: bool,
) -> None:
    """Train all steps of the stream of CONFIG.

    CONFIG is a yaml file or the name of a shipped one. The same command continues an interrupted
    stream: committed steps are skipped, and the next step continues from its newest snapshot.
    SIGTERM and SIGUSR2 stop it with a snapshot and exit code 143. Under torchrun, srun or mpirun
    each process is one rank, without --processes.

    \b
    Examples:
      avcil train demo --processes 2
      avcil train demo --smoke
      avcil train demo method=finetune optim.lr=3e-4 seed=1
      torchrun --nproc-per-node 8 --no-python avcil train my.yaml engine=zero2
    """
    from launch.fork_server import start_early

    start_early()  # before the imports of this process, which take seconds too

    from avcil_dist.compose import load_config
    from launch.local import run_stream
    from launch.resume_policy import ResumePolicy
    from launch.smoke import smoke_config

    resolved = load_config(config, overrides)
    if smoke:
        resolved = smoke_config(resolved)
    policy = ResumePolicy(restart or smoke, restart_step)
    restarted = "--restart" if restart else "--restart-step" if restart_step else None
    note = f"without {restarted} {CONTINUES_TRAINING}" if restarted else CONTINUES_TRAINING
    with interrupt_note("" if smoke else note):
        stream = run_stream(resolved, processes=processes, policy=policy)
    if smoke:
        echo_once(f"{stream}: {SMOKE_NOTE}")
    else:
        echo_once(f"{stream}: all steps are committed; see them with: avcil report {stream}")
