"""Clips that are a folder of pictures with a wav: `ID/00001.jpg …` and `ID.wav`, wherever a video file may be.

The wav is beside the folder, in it, or in a folder of sounds.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from avcil_dist.errors import ConfigError, DataError
from data_shards.listings.listing import PICTURE_ENDINGS, ClipFile, FrameSeries, ListedClip, ListingRow

MAX_RATE = 1000.0


@dataclass(frozen=True)
class FrameOptions:
    """Pictures a second, for pictures without times, and the folder of the wav files; None: beside the pictures."""

    rate: float | None = None
    sounds: Path | None = None

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate <= MAX_RATE:
            raise ConfigError(f"--fps {self.rate:g}: more than 0 and at most {MAX_RATE:g} pictures a second")


def is_frame_folder(path: Path) -> bool:
    """Whether the path is a folder with pictures."""
    return path.is_dir() and any(is_picture(entry.name) for entry in path.iterdir())


def is_picture(name: str) -> bool:
    """Whether a file name is that of a picture."""
    return not name.startswith(".") and Path(name).suffix.lower() in PICTURE_ENDINGS


def frame_folder(path: Path) -> ClipFile:
    """The clip file of a folder of pictures; rate and sound are added by `with_frame_options`."""
    return ClipFile(str(path), frames=FrameSeries())


def with_frame_options(rows: Iterable[ListingRow], options: FrameOptions) -> Iterator[ListingRow]:
    """Yield the rows with rate and sound of the clips that are folders of pictures."""
    sounds: dict[str, Path] = {}
    if options.sounds is not None:
        if not options.sounds.is_dir():
            raise DataError(f"{options.sounds}: no such folder")
        for path in sorted(options.sounds.rglob("*")):
            if path.suffix.lower() == ".wav":
                sounds.setdefault(path.stem, path)

    def completed(file: ClipFile) -> ClipFile:
        if file.frames is None:
            return file
        folder = Path(file.path)
        sound = sounds.get(folder.name) if options.sounds is not None else _sound_beside(folder)
        return file._replace(frames=FrameSeries(options.rate, str(sound) if sound else None))

    def with_files(clip: ListedClip) -> ListedClip:
        is_plain = all(file.frames is None for file in clip.files)
        return clip if is_plain else replace(clip, files=tuple(map(completed, clip.files)))

    for row in rows:
        yield row._replace(clip=with_files(row.clip))


def _sound_beside(folder: Path) -> Path | None:
    """The wav of the folder's name beside it or in it, or the only one in it."""
    for path in (folder.with_name(f"{folder.name}.wav"), folder / f"{folder.name}.wav"):
        if path.is_file():
            return path
    inside = [path for path in folder.iterdir() if path.suffix.lower() == ".wav"] if folder.is_dir() else []
    return inside[0] if len(inside) == 1 else None
