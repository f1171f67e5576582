"""Usual names of video files: the source video, and the time span, that a file name holds.

VGGSound, AudioSet, Kinetics and AVE name videos by YouTube's ids (11 characters), alone or with times.
"""

import re
from typing import NamedTuple

NUMBER = r"\d+(?:\.\d+)?"
SOURCES = (
    re.compile(rf"([A-Za-z0-9_-]{{11}})_{NUMBER}(?:_{NUMBER})?"),  # ID_000030, ID_12.09, ID_30_40, ID_30000_40000
    re.compile(r"(.+)_\d{6}_\d{6}"),  # Kinetics: ID_000030_000040
    re.compile(r"(.+_g\d{2})_c\d{2}"),  # UCF101: the clips of a group are of one video
)


class NamedSpan(NamedTuple):
    """A video id and the one or two numbers after it, as a file name has them."""

    video: str
    begin: float
    end: float | None


def source_video(stem: str) -> str:
    """The source video of a file name without its ending: the name without its times, where it has some."""
    matches = (pattern.fullmatch(stem) for pattern in SOURCES)
    return next((match[1] for match in matches if match), stem)


def named_spans(stem: str) -> list[NamedSpan]:
    """The readings of a file name without its ending as an id with times: an id may itself end like a time."""
    spans = []
    for count in (2, 1):
        match = re.fullmatch("(.+?)" + rf"_({NUMBER})" * count, stem, re.ASCII)
        if match:
            spans.append(NamedSpan(match[1], float(match[2]), float(match[3]) if count == 2 else None))
    return spans
