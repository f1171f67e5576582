"""Lookup of video files by video id, for listings that name videos by id."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from avcil_dist.errors import ConfigError, DataError
from data_shards.listings.frame_folders import frame_folder, is_picture
from data_shards.listings.listing import MP4_ENDINGS, VIDEO_ENDINGS, WHOLE_FILE, ClipFile, ListedClip, safe_key
from data_shards.listings.video_names import NamedSpan, named_spans

VGGSOUND_SECONDS = 10
LONGEST_SECONDS = 10.5  # of a part's file; with a longer span, the numbers are of another unit


class VideoFolder:
    """The video files in a folder tree, found by their usual names in any container.

    A name is `ID`, or `ID` and the time of a part: `ID_000030`, `ID_30`, `ID_30_40`, `ID_30000_40000` (ms) or
    `ID_000030_000040`. Where several files may be a clip, files of the part come before the whole video, and mp4 files
    before others; the first that decodes is taken.
    """

    def __init__(self, listing: Path, folder: Path | None) -> None:
        """Index the files of `folder`. Raises ConfigError without a folder, DataError where it is none."""
        if folder is None:
            raise ConfigError(f"{listing}: names videos by id; give the folder of the files with --videos FOLDER")
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        self.folder = folder
        self._whole: dict[str, list[ClipFile]] = {}
        self._parts: dict[str, list[tuple[NamedSpan, ClipFile]]] = {}
        for path, is_series in sorted(self._walk(), key=lambda found: (_suffix(found[0]) not in MP4_ENDINGS, found)):
            name = path.name if is_series else path.stem
            file = frame_folder(path) if is_series else ClipFile(str(path))
            self._whole.setdefault(name, []).append(file)
            for span in named_spans(name):
                self._parts.setdefault(span.video, []).append((span, file))

    def _walk(self) -> Iterator[tuple[Path, bool]]:
        """The video files and the folders of pictures; whether it is one of these."""
        visited = set()
        for folder, subfolders, names in os.walk(self.folder, followlinks=True, onerror=_refuse):
            real = os.path.realpath(folder)
            if real in visited:  # a link to a folder around it
                subfolders.clear()
                continue
            visited.add(real)
            if any(map(is_picture, names)):
                yield Path(folder), True
            yield from ((Path(folder, name), False) for name in names if _suffix(Path(name)) in VIDEO_ENDINGS)

    def clip_at(self, video: str, start: int) -> ListedClip:
        """The ten seconds from second `start` on: a file of their own, or a cut of the whole video's file."""
        files = [_all_of(file) for span, file in self._parts.get(video, []) if _is_span_at(span, start)]
        cut = float(start), float(VGGSOUND_SECONDS)
        files += [file._replace(cut=cut) for file in self._whole.get(video, [])]
        return self._clip(files, f"{video}_{start:06d}", video, float(start))

    def whole_video(self, video: str) -> ListedClip:
        """The file of a video: `ID`, or, as Kinetics names its files, `ID_000012_000022`."""
        files = [*self._whole.get(video, []), *(file for _, file in self._parts.get(video, []))]
        return self._clip([_all_of(file) for file in files], video, video, 0.0)

    def clip_of_key(self, key: str) -> ListedClip:
        """The clip of a key: a video id, or, as VGGSound's keys, id and second: `ID_000030`."""
        match = re.fullmatch(r"(.+)_(\d{6})", key)
        return self.clip_at(match[1], int(match[2])) if match else self.whole_video(key)

    def _clip(self, files: list[ClipFile], name: str, video: str, start: float) -> ListedClip:
        """The clip in the first of the files; without one, in the file that it would be."""
        found = tuple(files) or (ClipFile(str(self.folder / f"{name}.mp4")),)
        return ListedClip(found, safe_key(name), video, start, is_named_by_id=True)


def _all_of(file: ClipFile) -> ClipFile:
    """The whole of a file, converted where it is no mp4."""
    is_mp4 = _suffix(Path(file.path)) in MP4_ENDINGS
    return file if is_mp4 or file.frames is not None else file._replace(cut=WHOLE_FILE)


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _is_span_at(span: NamedSpan, start: int) -> bool:
    """Whether a file's times are those of the part from `start` on, in seconds or, as in AudioSet, in ms."""
    if span.end is None:
        return span.begin == start
    return any(span.begin == start * unit and 0 < span.end - span.begin <= LONGEST_SECONDS * unit for unit in (1, 1000))


def _refuse(error: OSError) -> None:
    """Raise DataError for a folder that cannot be read: its clips would be missing."""
    raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from None
