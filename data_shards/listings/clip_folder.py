"""A folder of clips: `FOLDER/<split>/<class>/*`, or `FOLDER/<class>/*`, split within each class by source video.

Classes are sorted by name. Files without the ending of a video are passed over and counted. Files that differ in their
ending only are alternatives of one clip. A clip may also be a folder of pictures, `FOLDER/<class>/ID/*.jpg`.
"""

from dataclasses import replace
from pathlib import Path

from avcil_dist.data.shard import SPLITS
from avcil_dist.errors import DataError
from data_shards.listings.frame_folders import frame_folder, is_frame_folder
from data_shards.listings.listing import (
    VIDEO_ENDINGS,
    ClipFile,
    ListedClip,
    Listing,
    ListingRow,
    clean_label,
    parse_split,
    refuse_shares,
    safe_key,
    split_rows,
)
from data_shards.listings.splits import SplitShares
from data_shards.listings.video_names import source_video

NEEDS_VIDEOS = False


def matches(path: Path) -> bool:
    """Whether it is a folder. Published lists are a folder too, and are matched before."""
    return path.is_dir()


def read(path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
    """The video files of the folder. Raises DataError for splits beside folders that are none."""
    top = _folders(path)
    splits = [entry for entry in top if entry.name in SPLITS]
    others = [entry for entry in top if entry not in splits and (not splits or _has_video(entry))]
    if splits and others:
        raise DataError(f"{path}: {others[0].name}: none of {', '.join(SPLITS)}; rename or move this folder")
    if splits:
        refuse_shares(shares, path)
    rows, clips, passed_over = list[ListingRow](), list[tuple[str, str, ListedClip]](), 0
    for entry in sorted(
        [entry for split in splits for entry in _folders(split)] or others, key=lambda entry: entry.name
    ):
        label = clean_label(entry.name, str(entry))
        files = [file for file in entry.iterdir() if file.is_file() and not file.name.startswith(".")]
        series = sorted(folder for folder in _folders(entry) if is_frame_folder(folder))
        sounds = {f"{folder.name}.wav" for folder in series}
        by_stem: dict[str, list[ClipFile]] = {}
        for file in sorted(files, key=lambda file: (file.stem, file.suffix.lower() != ".mp4", file.name)):
            if file.suffix.lower() in VIDEO_ENDINGS:
                by_stem.setdefault(file.stem, []).append(ClipFile(str(file)))
            elif file.name not in sounds:
                passed_over += 1
        for folder in series:
            by_stem.setdefault(folder.name, []).append(frame_folder(folder))
        for stem, same_stem in by_stem.items():
            clip = ListedClip(tuple(same_stem), safe_key(stem), stem)
            if splits:
                rows.append(ListingRow(label, parse_split(entry.parent.name, str(entry)), clip))
            else:
                clips.append((label, source_video(stem), clip))
    return replace(Listing.from_rows(rows or split_rows(clips, shares, path)), passed_over=passed_over)


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _has_video(folder: Path) -> bool:
    return any(path.suffix.lower() in VIDEO_ENDINGS for path in folder.rglob("*"))
