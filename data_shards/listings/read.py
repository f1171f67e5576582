"""`read_listing`: reads any supported form of listing. A further form is one module beside this one.

A form is a module with `NEEDS_VIDEOS`, `matches` and `read` (see `ListingForm`), listed in `FORMS`. Files are found
and named here; nothing but the listing itself is opened.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Protocol

from avcil_dist.errors import ConfigError, DataError
from avcil_dist.system.file_status import is_there
from data_shards.listings import ave, clip_folder, clips_csv, published_lists, vggsound
from data_shards.listings.frame_folders import FrameOptions, with_frame_options
from data_shards.listings.importer import ClipImporter
from data_shards.listings.listing import Listing, ListingRow, clean_label, distinct_keys, stored_rows
from data_shards.listings.splits import SplitShares
from data_shards.listings.text_files import first_row

LAYOUT = "a folder of clips is FOLDER/<split>/<class>/*.mp4 or FOLDER/<class>/*.mp4"


class ListingForm(Protocol):
    """A form of listing. `NEEDS_VIDEOS`: clips are named by video id, and the folder of the files is needed."""

    NEEDS_VIDEOS: bool

    def matches(self, path: Path) -> bool:
        """Whether `path`, an existing file or folder, is a listing of this form."""

    def read(self, path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
        """The listing at `path`; clips without a split are split by `shares` (None: the usual ones).

        Raises DataError, naming file and line, for a faulty one; ConfigError for `shares` where it has its own splits.
        """


NO_OPTIONS = FrameOptions()
FORMS: tuple[ListingForm, ...] = (published_lists, clip_folder, clips_csv, ave, vggsound)


def read_listing(
    path: Path,
    videos: Path | None = None,
    shares: SplitShares | None = None,
    frames: FrameOptions = NO_OPTIONS,
    form: ListingForm | ClipImporter | None = None,
) -> Listing:
    """The listing at `path` in this form, or in the first of `FORMS` that matches; each module describes its form.

    `videos` is the folder of the files of a listing that names videos by id. `shares` are those of the splits of each
    class, for a listing without splits (None: 0.8, 0.1 and 0.1). `frames` are options of clips that are folders of
    pictures. Raises DataError, naming file and line, for a listing that is missing, of no known form, faulty or empty;
    ConfigError where `videos` is missing, or given to a listing that has paths, or `shares` to one that has splits.
    """
    try:
        listing, rows = _read_listing(path, videos, shares, form)
        return replace(listing, rows=stored_rows(with_frame_options(rows, frames)))
    except OSError as error:  # of a folder or a file of it, such as one without permission
        raise DataError(f"{error.filename or path}: cannot be read ({error.strerror})") from None


def _read_listing(
    path: Path, videos: Path | None, shares: SplitShares | None, form: ListingForm | ClipImporter | None
) -> tuple[Listing, Iterator[ListingRow]]:
    """The listing as its form reads it, with its classes, and its rows with distinct keys."""
    if not is_there(path):
        raise DataError(f"{path}: missing; give a csv with the header path,label,split, or a folder of clips")
    form = form or next((form for form in FORMS if form.matches(path)), None)
    if form is None:
        raise DataError(f"{path}: its header is {','.join(first_row(path))[:200]!r}; make it path,label,split")
    if videos is not None and not form.NEEDS_VIDEOS:
        raise ConfigError(f"{path}: has the paths of its clips; leave out --videos")
    listing = form.read(path, videos, shares)
    if not listing.rows:
        raise DataError(f"{path}: no clips in it; {LAYOUT}")
    root = videos or (path if path.is_dir() else path.parent)
    clean = cache(lambda name: clean_label(name, str(path)))
    classes, rows = dict.fromkeys(map(clean, listing.classes)), listing.rows
    if any(clean(row.label) != row.label for row in rows):
        rows = stored_rows(row._replace(label=clean(row.label)) for row in rows)
    return Listing(tuple(classes), (), listing.passed_over, str(path)), distinct_keys(rows, root)
