"""`avcil bench`: how fast this machine is at what a run consists of."""

import json
import os
from pathlib import Path
from typing import Any

import click

WIDTH = 120  # of the tables, terminal or not


@click.group()
def bench() -> None:
    """Measure this machine: an iteration of training, the loader, a whole stream."""


def _write(found: dict[str, Any], path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(found, indent=1) + "\n")
        click.echo(f"wrote {path}")


_JSON = click.option("--json", "path", type=click.Path(dir_okay=False), help="Also write all figures to this file.")
_COUNT = click.IntRange(min=1)


@bench.command()
@click.option("--current", type=_COUNT, default=16, show_default=True, help="Clips of the current step.")
@click.option("--replay", type=_COUNT, default=8, show_default=True, help="Exemplars beside them.")
@click.option("--frames", type=_COUNT, default=8, show_default=True)
@click.option("--positions", type=_COUNT, default=196, show_default=True, help="Tokens of a frame.")
@click.option("--dim", type=_COUNT, default=768, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=28, show_default=True, help="Seen classes.")
@click.option("--old", type=_COUNT, default=21, show_default=True, help="Those of them that the teacher knows.")
@click.option("--precision", type=click.Choice(["float32", "bf16", "fp16"]), default="float32", show_default=True)
@click.option("--attention", type=click.Choice(["auto", "torch"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: a GPU where there is one.")
@click.option("--threads", type=_COUNT, help="Default: one a core.")
@click.option("--turns", type=_COUNT, default=7, show_default=True, help="Iterations of each side that count.")
@_JSON
def step(device: str | None, threads: int | None, turns: int, path: str | None, **shape: Any) -> None:
    """Time one iteration of avcil, and its peak of memory, beside a plain eager one on the same inputs.

    Rows: the eager iteration as the paper reads, in float32; ours with the teacher asked for the
    logits of all clips; and ours where those are at hand, as they are after a step's first epoch on
    features. TFLOP/s and GB/s are of what the definition needs: a product of a clip's tokens
    forward, one for the gradient, one of the teacher; the tokens once for each.
    """
    import torch
    from rich.console import Console

    from avcil_dist.errors import ConfigError
    from launch.bench_sides import Setting
    from launch.bench_step import measure, show

    if shape["old"] >= shape["classes"]:
        raise ConfigError(f"--old {shape['old']} must be less than --classes {shape['classes']}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; use --device cpu")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cores = threads or len(os.sched_getaffinity(0))
    found = measure(Setting(**shape, device=chosen, threads=cores), turns)
    show(found, Console(width=WIDTH))
    _write(found, path)
