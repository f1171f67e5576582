"""`avcil bench`: speed of a training iteration, the loader, decoding and a stream on this machine."""

import json
import os
from pathlib import Path
from typing import Any

import click

from launch.cli.output import echo


@click.group()
def bench() -> None:
    """Measure this machine: an iteration of training, the loader, decoding, a whole stream."""


def _write(figures: dict[str, Any], path: str | None) -> None:
    from avcil_dist import storage

    if path:
        storage.write_bytes(path, json.dumps(figures, indent=1).encode() + b"\n")
        echo(f"wrote {path}")


_JSON = click.option("--json", "path", type=click.Path(dir_okay=False), help="Also write all figures to this file.")
_COUNT = click.IntRange(min=1)


@bench.command()
@click.option("--current", type=_COUNT, default=16, show_default=True, help="Clips of the current step.")
@click.option("--replay", type=_COUNT, default=8, show_default=True, help="Exemplars beside them.")
@click.option("--frames", type=_COUNT, default=8, show_default=True)
@click.option("--positions", type=_COUNT, default=196, show_default=True, help="Tokens of a frame.")
@click.option("--dim", type=_COUNT, default=768, show_default=True)
@click.option("--classes", type=click.IntRange(min=2), default=28, show_default=True, help="Seen classes.")
@click.option("--old", type=_COUNT, default=21, show_default=True, help="Seen classes of earlier steps, the teacher's.")
@click.option("--precision", type=click.Choice(["float32", "bf16", "fp16"]), default="float32", show_default=True)
@click.option("--attention", type=click.Choice(["auto", "torch"]), default="auto", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Default: cuda if a GPU is available.")
@click.option("--threads", type=_COUNT, help="Default: one per core.")
@click.option("--turns", type=_COUNT, default=7, show_default=True, help="Measured iterations of each contender.")
@_JSON
def step(device: str | None, threads: int | None, turns: int, path: str | None, **shape: Any) -> None:
    """Measure time and peak memory of one iteration of avcil, beside a plain eager one on the same inputs.

    Rows: the eager iteration as in the paper, in float32; ours with the teacher computed for all clips; and ours with
    cached teacher logits, as in all epochs after the first of a step on features. TFLOP/s and GB/s count what the
    definition needs: one product of a clip's tokens for forward, one for the gradient, one for the teacher, and one
    read of the tokens for each.
    """
    import torch
    from rich.console import Console

    from avcil_dist.errors import ConfigError
    from launch.bench.contenders import BenchSetting
    from launch.bench.step import measure, show

    if shape["old"] >= shape["classes"]:
        raise ConfigError(f"--old {shape['old']} must be less than --classes {shape['classes']}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU; use --device cpu")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cores = threads or len(os.sched_getaffinity(0))
    figures = measure(BenchSetting(**shape, device=chosen, threads=cores), turns)
    show(figures, Console())
    _write(figures, path)


@bench.command()
@click.option("--clips", type=click.IntRange(min=64), default=256, show_default=True, help="2.4 MB each.")
@click.option("--batch", type=_COUNT, default=32, show_default=True)
@click.option("--frames", type=_COUNT, default=8, show_default=True)
@click.option("--positions", type=_COUNT, default=196, show_default=True, help="Tokens of a frame.")
@click.option("--dim", type=_COUNT, default=768, show_default=True)
@click.option("--repeats", type=_COUNT, default=3, show_default=True, help="Runs of each; the best is reported.")
@click.option("--folder", type=click.Path(file_okay=False), help="Folder for temporary data. Default: TMPDIR.")
@_JSON
def loader(folder: str | None, path: str | None, **setting: Any) -> None:
    """Measure the rate of shuffled batches of feature clips from the local disk, beside plain reading."""
    from avcil_dist import storage
    from launch.bench.loader import measure_loader

    with storage.temporary_folder(folder) as data_folder:
        figures = measure_loader(data_folder, **setting)
    for name, value in figures["gigabytes_per_second"].items():
        echo(f"{name}: {value:.2f} GB/s")
    _write(figures, path)


@bench.command()
@click.option("--clips", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of mp4 files.")
@click.option("--count", type=_COUNT, default=128, show_default=True, help="Clips; the files are repeated.")
@click.option("--batch", type=_COUNT, default=8, show_default=True)
@click.option("--processes", type=_COUNT, help="Decoding processes. Default: one per core.")
@click.option("--repeats", type=_COUNT, default=2, show_default=True, help="Runs of each; the best is reported.")
@click.option("--folder", type=click.Path(file_okay=False), help="Folder for temporary data. Default: TMPDIR.")
@_JSON
def video(folder: str | None, path: str | None, processes: int | None, **setting: Any) -> None:
    """Measure decoding of mp4 clips: training batches and shard building, beside plain decoding of the same clips.

    Plain decoding decodes all frames and samples with PyAV in as many processes, and keeps nothing. Where torchcodec
    is installed, its rate for the frames and the sound of training clips is measured too.
    """
    from avcil_dist import storage
    from launch.bench.video import measure_video

    with storage.temporary_folder(folder) as data_folder:
        figures = measure_video(data_folder, processes=processes or len(os.sched_getaffinity(0)), **setting)
    for name, value in figures["clips_per_second"].items():
        echo(f"{name}: {value:.1f} clips/s ({figures['share_of_plain_decoding'][name]:.2f} of plain decoding)")
    _write(figures, path)


@bench.command()
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--iterations", type=_COUNT, default=40, show_default=True, help="Minimum number of iterations per step.")
@click.option("--clips", type=_COUNT, default=64, show_default=True, help="Training clips of a step, 2.4 MB each.")
@click.option("--frames", type=_COUNT, default=8, show_default=True)
@click.option("--positions", type=_COUNT, default=196, show_default=True, help="Tokens of a frame.")
@click.option("--dim", type=_COUNT, default=768, show_default=True)
@click.option("--folder", type=click.Path(file_okay=False), help="Folder for temporary data. Default: TMPDIR.")
@_JSON
def stream(folder: str | None, path: str | None, overrides: tuple[str, ...], **setting: Any) -> None:
    """Train two steps on random features and estimate the hours of a full run such as vs100_ci.

    The settings are those of vs100_ci, changed by KEY=VALUE. The second step, which has a teacher and exemplars, is
    measured; its first epoch, which fills caches, is reported separately.

    \b
    Example:
      avcil bench stream optim.global_batch=16 optim.global_replay_batch=8 engine.precision=bf16
    """
    from avcil_dist import storage
    from launch.bench.stream import measure_stream

    with storage.temporary_folder(folder) as data_folder:
        figures = measure_stream(data_folder, overrides=overrides, **setting)
    hours = figures["vs100_ci_hours"]
    echo(
        f"{figures['iterations']} iterations of {figures['batch']} + {figures['replay_batch']} clips: "
        f"{figures['iterations_per_second']:.2f} iterations/s after the first epoch\n"
        f"waiting for data: {figures['waiting_share_first_epoch']:.1%} of the first epoch, "
        f"{figures['waiting_share_later_epochs']:.1%} of the others\n"
        f"a run like vs100_ci, 10 steps of 200 epochs: {hours['training']:.2f} h of training, "
        f"{hours['validation']:.2f} h of validation"
    )
    _write(figures, path)
