"""Lookup of video files by video id, for listings that name videos by id."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from avcil_dist.errors import ConfigError, DataError
from data_shards.listings.listing import MP4_ENDINGS, VIDEO_ENDINGS, ListedClip, safe_key

VGGSOUND_SECONDS = 10


class VideoFolder:
    """The video files in a folder tree, found by their usual names.

    These are `ID_000030`, `ID_30000_40000`, `ID_000030_000040` and `ID`.
    """

    def __init__(self, listing: Path, folder: Path | None) -> None:
        """Index the files of `folder`. Raises ConfigError without a folder, DataError where it is none."""
        if folder is None:
            raise ConfigError(f"{listing}: names videos by id; give the folder of the files with --videos FOLDER")
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder")
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._spans: dict[str, Path] = {}
        for path in sorted(self._walk()):
            self._files.setdefault(path.stem, path)
            span = re.fullmatch(r"(.+)_\d+_\d+", path.stem)
            if span:
                self._spans.setdefault(span[1], path)

    def _walk(self) -> Iterator[Path]:
        visited = set()
        for folder, subfolders, names in os.walk(self.folder, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # a link to a folder around it
                subfolders.clear()
                continue
            visited.add(real)
            yield from (Path(folder, name) for name in names if Path(name).suffix.lower() in VIDEO_ENDINGS)

    def clip_at(self, video: str, start: int) -> ListedClip:
        """The ten seconds from second `start` on: a file of their own, or a cut of the whole video's file."""
        end = start + VGGSOUND_SECONDS
        key = f"{video}_{start:06d}"
        for name in (key, f"{video}_{start * 1000}_{end * 1000}", f"{video}_{start:06d}_{end:06d}"):
            if name in self._files:
                file = self._files[name]
                convert = None if file.suffix.lower() in MP4_ENDINGS else (0.0, None)  # a cut of all of it is an mp4
                return ListedClip(str(file), safe_key(key), video, float(start), convert)
        if video in self._files:
            cut = float(start), float(VGGSOUND_SECONDS)
            return ListedClip(str(self._files[video]), safe_key(key), video, float(start), cut)
        return ListedClip(str(self.folder / f"{key}.mp4"), safe_key(key), video, float(start))

    def whole_video(self, video: str) -> ListedClip:
        """The file of a video: `ID`, or, as Kinetics names its files, `ID_000012_000022`."""
        path = self._files.get(video) or self._spans.get(video) or self.folder / f"{video}.mp4"
        return ListedClip(str(path), safe_key(video), video)

    def clip_of_key(self, key: str) -> ListedClip:
        """The clip of a key: a video id, or, as VGGSound's keys, id and second: `ID_000030`."""
        match = re.fullmatch(r"(.+)_(\d{6})", key)
        return self.clip_at(match[1], int(match[2])) if match else self.whole_video(key)
