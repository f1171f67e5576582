"""Base class of importers of clips: a plug-in that reads the listing of a data set of another layout."""

from abc import ABC, abstractmethod
from pathlib import Path

from data_shards.listings.listing import Listing
from data_shards.listings.splits import SplitShares


class ClipImporter(ABC):
    """Reader of a layout of clips, for `avcil shards build SOURCE OUTPUT --importer NAME`.

    The clips that it lists are checked, decoded and packed as those of any listing. `NEEDS_VIDEOS`: clips are named by
    video id, and the folder of the files is needed (`--videos`).
    """

    NEEDS_VIDEOS = False

    @abstractmethod
    def read(self, path: Path, videos: Path | None, shares: SplitShares | None) -> Listing:
        """Return the clips at `path`, an existing file or folder.

        `shares` are those of the splits of each class, for clips without splits: None for the usual ones
        (`split_rows`). Raises DataError, naming file and line, for a faulty listing; ConfigError for `shares` where the
        clips have splits (`refuse_shares`).
        """
