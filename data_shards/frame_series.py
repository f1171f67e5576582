"""Clips that are a folder of pictures and a wav file: their times, and their conversion to mp4.

The pictures and the sound are put into one file as they are, with the times of the pictures; the cut of that file
(`cut.py`) encodes them, as it does with any video.
"""

import math
import re
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from heapq import merge
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import av

from avcil_dist import storage
from avcil_dist.errors import DataError
from avcil_dist.storage.retry import NO_ROOM
from data_shards.cut import cut_clip
from data_shards.listings.listing import PICTURE_ENDINGS, WHOLE_FILE, ClipFile, FrameSeries
from data_shards.rejections import ClipRejectedError

TIME_FILES = ("times.txt", "timestamps.txt")
DECODERS = {".jpg": "jpeg_pipe", ".jpeg": "jpeg_pipe", ".png": "png_pipe"}
MAX_PICTURES = 200_000
MAX_BYTES = 1 << 31  # of all pictures and the sound
TICK = Fraction(1, 90_000)  # seconds, of the file in between
OPTIONS = {"video_track_timescale": str(TICK.denominator)}
CLOSE = 5e-4  # seconds; pictures that are closer have one time
USUAL_SECONDS = 0.04  # that a single picture is shown


def series_clip(file: ClipFile, series: FrameSeries) -> bytes:
    """The clip of a folder of pictures as an mp4. Raises DataError for one without sound, times or good pictures."""
    folder = Path(file.path)
    pictures = timed_pictures(folder, series.rate)
    if series.sound is None:
        raise ClipRejectedError("silent", f"no sound: {folder.name}.wav is missing")
    sound = Path(series.sound)
    if sum(path.stat().st_size for path in (sound, *(path for _, path in pictures))) > MAX_BYTES:
        raise ClipRejectedError("format", f"more than {MAX_BYTES >> 30} GiB of pictures and sound")
    with storage.temporary_folder() as temporary:
        joined = temporary / "joined.mov"
        try:
            _join(joined, pictures, sound, series.rate)
        except (av.FFmpegError, ValueError, EOFError) as error:
            if isinstance(error, av.FFmpegError) and error.errno in NO_ROOM:  # of the disk: no fault of this clip
                raise OSError(error.errno, error.strerror) from None
            raise DataError(f"its pictures and sound cannot be joined ({error})") from None
        try:
            return cut_clip(str(joined), *(file.cut or WHOLE_FILE))
        except DataError as error:
            kind = error.kind if isinstance(error, ClipRejectedError) else "corrupt"
            raise ClipRejectedError(kind, str(error).removeprefix(f"{joined}: ")) from None


def series_stamp(folder: Path, series: FrameSeries) -> tuple[int, str] | None:
    """The number of files in a folder of pictures, and a text that changes with them, their rate, and their sound."""
    try:
        count, states = len(list(folder.iterdir())), [folder.stat()]
        states += [Path(series.sound).stat()] if series.sound else []
    except OSError:
        return None
    return count, " ".join([f"{series.rate}", *(f"{state.st_size} {state.st_mtime_ns}" for state in states)])


def timed_pictures(folder: Path, rate: float | None) -> list[tuple[float, Path]]:
    """The pictures of a folder with the seconds at which they begin, in order.

    The times are those of a file (`times.txt`: one line a picture, in the order of names, or name and seconds), or of
    the names (`12.480.jpg`), or the pictures are numbered from 0 or 1 and follow with `rate` a second; a number that is
    missing is a time without a new picture. Raises DataError for any other folder.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_ENDINGS and path.name[0] != ".")
    if not 0 < len(paths) <= MAX_PICTURES:
        raise ClipRejectedError("format", f"{len(paths)} pictures in the folder, 1 to {MAX_PICTURES} are possible")
    for name in TIME_FILES:
        if (folder / name).is_file():
            return _checked(_listed(folder / name, paths))
    if all(re.fullmatch(r"\d+\.\d+", path.stem, re.ASCII) for path in paths):
        return _checked([(float(path.stem), path) for path in paths])
    if rate is None:
        raise ClipRejectedError("format", "no times of its pictures; give their number a second (--fps) or times.txt")
    numbers = [_number(path) for path in paths]
    origin = 0 if 0 in numbers else 1
    return _checked([((number - origin) / rate, path) for number, path in zip(numbers, paths, strict=True)])


def _number(path: Path) -> int:
    match = re.search(r"(\d{1,12})$", path.stem, re.ASCII)
    if match is None:
        raise ClipRejectedError("format", f"{path.name}: no number at the end of its name")
    return int(match[1])


def _listed(file: Path, paths: list[Path]) -> list[tuple[float, Path]]:
    """The pictures with the times in a text file, a line for each."""
    by_name = {name: path for path in paths for name in (path.name, path.stem)}
    try:
        lines = [line.split() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        if all(len(words) == 1 for words in lines):
            return [(float(words[0]), path) for words, path in zip(lines, paths, strict=True)]
        return [(float(seconds), by_name[name]) for name, seconds in lines]
    except (ValueError, KeyError) as error:
        raise ClipRejectedError(
            "format",
            f"{file.name}: not one line for each of {len(paths)} pictures, seconds, or name and seconds ({error})",
        ) from None


def _checked(pictures: list[tuple[float, Path]]) -> list[tuple[float, Path]]:
    ordered = sorted(pictures)
    for time, path in ordered:
        if not (math.isfinite(time) and 0 <= time < 1e6):
            raise ClipRejectedError("format", f"{path.name}: {time:g} s is no time of a picture")
    for (before, first), (after, second) in pairwise(ordered):
        if after - before < CLOSE:
            raise ClipRejectedError("format", f"{first.name} and {second.name} have one time, {after:g} s")
    return ordered


def _join(joined: Path, pictures: list[tuple[float, Path]], sound: Path, rate: float | None) -> None:
    """Write pictures and sound into one file, without decoding them."""
    with ExitStack() as stack:
        target = stack.enter_context(av.open(str(joined), "w", format="mov", container_options=OPTIONS))
        first = pictures[0][1]
        template = stack.enter_context(av.open(f"file:{first.absolute()}", format=DECODERS[first.suffix.lower()]))
        video: Any = target.add_stream_from_template(template.streams.video[0])
        source = stack.enter_context(av.open(f"file:{sound.absolute()}", format="wav"))
        if not source.streams.audio:
            raise ClipRejectedError("silent", f"no sound in {sound.name}")
        audio: Any = target.add_stream_from_template(source.streams.audio[0])
        if pictures[0][0] * 1000 > _duration_ms(source):
            raise ClipRejectedError("format", f"{first.name} begins after the end of its sound; number from 0 or 1")
        for _, packet in merge(_pictures(pictures, video, rate), _sounds(source, audio), key=lambda timed: timed[0]):
            target.mux(packet)


def _duration_ms(source: Any) -> float:
    return (source.duration or 0) / av.time_base * 1000


def _pictures(pictures: list[tuple[float, Path]], video: Any, rate: float | None) -> Iterator[tuple[float, Any]]:
    times = [time for time, _ in pictures]
    gaps = [after - before for before, after in pairwise(times)]
    last = 1 / rate if rate else median(gaps) if gaps else USUAL_SECONDS
    for number, (time, path) in enumerate(pictures):
        packet = av.Packet(path.read_bytes())
        packet.stream, packet.time_base, packet.is_keyframe = video, TICK, True
        packet.pts = packet.dts = round(time / TICK)
        packet.duration = max(1, round((gaps[number] if number < len(gaps) else last) / TICK))
        yield time, packet


def _sounds(source: Any, audio: Any) -> Iterator[tuple[float, Any]]:
    for packet in source.demux(audio=0):
        if packet.dts is not None and packet.size:
            time = float(packet.pts * packet.time_base)
            packet.stream = audio
            yield time, packet
