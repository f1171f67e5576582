"""Attention of streams on clips: from folders and files to a figure, and a table of the share on known regions."""

from collections.abc import Sequence
from pathlib import PurePosixPath
from statistics import fmean
from typing import Annotated

from pydantic import Field
from rich.console import Console

from avcil_dist import storage
from avcil_dist.errors import ConfigError
from avcil_dist.inference.attention import Heat, prepare_clips, step_attention
from avcil_dist.models.attention.token_map import Box
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.reporting.attention import FILM_RATE, AttentionRow, ClipFigure
from avcil_dist.reporting.tables import WordTable, plain
from avcil_dist.streams.summary import committed_steps, load_summary

FORMATS = (".html", ".png", ".mp4")
Fraction = Annotated[float, Field(ge=0, le=1)]


def make_figure(
    paths: Sequence[str], steps: str, output: str, regions: str | None, heat: Heat, class_name: str | None
) -> list[ClipFigure]:
    """Write the figure of `avcil attention` and return what it shows.

    Raises ConfigError for paths without a stream or a clip, steps that are not committed, and streams that prepare
    clips differently; otherwise as `step_attention` and `prepare_clips` do.
    """
    ending = PurePosixPath(output).suffix
    if ending not in FORMATS:
        raise ConfigError(f"{output}: the figure is written as {', '.join(FORMATS)}; give a name that ends so")
    by_stream = {path.rstrip("/"): committed for path in paths if (committed := committed_steps(path.rstrip("/")))}
    clips = [path for path in paths if path.rstrip("/") not in by_stream]
    if not by_stream or not clips:
        missing = "no stream with a committed step" if clips else "no clip"
        raise ConfigError(f"{missing} among {', '.join(paths)}; give folders of streams, then video files")
    boxes = _read_regions(regions, clips) if regions else {}
    chosen = {stream: _chosen(steps, committed, stream) for stream, committed in by_stream.items()}
    configs = {stream: load_summary(stream, numbers[-1]).config for stream, numbers in chosen.items()}
    settings = {stream: clip_inputs(config.model, config.data.clip) for stream, config in configs.items()}
    first, *others = settings
    for other in others:
        if settings[other] != settings[first]:
            raise ConfigError(
                f"{other}: it prepares clips (data.clip) in another way than {first}; show them in two figures"
            )
    prepared = prepare_clips(clips, settings[first], FILM_RATE if ending == ".mp4" else None)
    rows: list[list[AttentionRow]] = [[] for _ in prepared]
    for stream, numbers in chosen.items():
        for number in numbers:
            found_by_clip = step_attention(stream, number, prepared, [class_name] * len(prepared), heat=heat)
            for url, own, found in zip(clips, rows, found_by_clip, strict=True):
                share = found.map.share(boxes[url]) if boxes and found.map.mass.any() else None
                own.append(AttentionRow(PurePosixPath(stream).name, number, found.map, found.predicted, share))
    figures = [
        ClipFigure(clip.name, clip.frames, clip.waveform, clip.sample_rate, own, boxes.get(clip.name), clip.film)
        for clip, own in zip(prepared, rows, strict=True)
    ]
    storage.write_bytes(output, _encoded(figures, ending, heat))
    return figures


def _encoded(figures: Sequence[ClipFigure], ending: str, heat: Heat) -> bytes:
    """The figure in the form that the ending names; each form imports its own library."""
    if ending == ".png":
        from avcil_dist.reporting.attention_picture import attention_picture

        return attention_picture(figures)
    if ending == ".mp4":
        from avcil_dist.reporting.attention_video import attention_video

        return attention_video(figures)
    from avcil_dist.reporting.attention_page import attention_page

    return attention_page(figures, heat).encode()


def print_shares(figures: Sequence[ClipFigure], heat: Heat, console: Console) -> None:
    """Print the mean share of the maps on the sounding region, by stream and step, with the number of clips.

    A clip without any evidence has no share. Nothing is printed without regions.
    """
    rows = [row for figure in figures for row in figure.rows]
    if all(row.share is None for row in rows):
        return
    console.print(
        plain(f"{heat.capitalize()} on the sounding region, %: mean (clips that have some / all)"), soft_wrap=True
    )
    table = WordTable("")
    table.add_column("stream")
    for step in (steps := sorted({row.step for row in rows})):
        table.add_column(f"step {step}", justify="right")
    for stream in dict.fromkeys(row.stream for row in rows):
        cells = []
        for step in steps:
            own = [row.share for row in rows if (row.stream, row.step) == (stream, step)]
            shares = [share for share in own if share is not None]
            cells.append(f"{100 * fmean(shares):.1f} ({len(shares)}/{len(own)})" if shares else f"– (0/{len(own)})")
        table.add_row(stream, *cells)
    console.print(table)


def _chosen(steps: str, committed: Sequence[int], stream: str) -> list[int]:
    """The steps of `--steps` for a stream. Raises ConfigError."""
    if steps == "all":
        return list(committed)
    numbers = [int(part) if part.isascii() and part.isdigit() else -1 for part in steps.split(",")]
    for number in numbers:
        if number not in committed:
            raise ConfigError(f"--steps {steps}: {stream} has the committed steps {', '.join(map(str, committed))}")
    return numbers


def _read_regions(url: str, clips: Sequence[str]) -> dict[str, Box]:
    """The sounding region of each clip, by the stem of its file's name. Raises DataError or ConfigError."""
    known = storage.read_json(url, dict[str, tuple[Fraction, Fraction, Fraction, Fraction]], "a table of regions")
    for clip in clips:
        if PurePosixPath(clip).stem not in known:
            raise ConfigError(f"{url}: has no region of {clip}; leave out --regions, or this clip")
    return {clip: known[PurePosixPath(clip).stem] for clip in clips}
