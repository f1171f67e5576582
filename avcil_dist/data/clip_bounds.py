"""Bounds on what one clip may cost to decode: memory and time. A clip beyond a bound is a damaged clip.

The bounds are far from any clip that people train on. They are checked on what a file declares, before anything is
decoded, and on what is decoded, because a stream may change on its way. Within them a clip takes less than
`MAX_MEMORY`, which is also the limit of a process that decodes (`limit_process`).
"""

import resource
from pathlib import Path

from avcil_dist.errors import DataError

MAX_PIXELS = 36_000_000  # of a picture; 8K has 33 million
MAX_ASPECT = 20  # long side by short side: a frame is scaled by its short side
MAX_DECODED_PIXELS = 50_000_000_000  # of all pictures together: minutes of work
MAX_PACKETS = 500_000  # of video and sound
MAX_SECONDS = 3_600
MAX_SAMPLE_RATE = 768_000  # Hz
MAX_CHANNELS = 64
MAX_SAMPLES = MAX_SECONDS * 48_000  # of the sound of one clip
MAX_MEMORY = 4 << 30  # bytes
MAX_DECODING_SECONDS = 600  # of a decoding process; far more than MAX_DECODED_PIXELS takes


def check_picture(width: int, height: int, where: str) -> None:
    """Raise DataError, naming `where`, for a picture with too many pixels or too long a side."""
    if width * height > MAX_PIXELS:
        raise DataError(f"{where}: pictures of {width} × {height} pixels; at most {MAX_PIXELS:,} pixels are decoded")
    if max(width, height) > MAX_ASPECT * max(min(width, height), 1):
        raise DataError(f"{where}: pictures of {width} × {height} pixels; at most {MAX_ASPECT} to 1 is decoded")


def check_sound(sample_rate: int, channels: int, samples: int, where: str) -> None:
    """Raise DataError, naming `where`, for sound with too high a rate, too many channels or too many samples."""
    if sample_rate > MAX_SAMPLE_RATE:
        raise DataError(f"{where}: sound at {sample_rate:,} Hz; at most {MAX_SAMPLE_RATE:,} Hz is decoded")
    if channels > MAX_CHANNELS:
        raise DataError(f"{where}: sound of {channels} channels; at most {MAX_CHANNELS} are decoded")
    if samples > MAX_SAMPLES:
        raise DataError(f"{where}: {samples:,} samples of sound; at most {MAX_SAMPLES:,} are decoded; cut it")


def check_length(seconds: float, pictures: int, pixels: int, where: str) -> None:
    """Raise DataError, naming `where`, for a clip that is too long, or too much work: `pictures` of `pixels` each."""
    if seconds > MAX_SECONDS:
        raise DataError(f"{where}: {seconds:,.0f} s long; at most {MAX_SECONDS:,} s are decoded; cut it")
    if pictures * pixels > MAX_DECODED_PIXELS:
        raise DataError(
            f"{where}: {pictures:,} pictures of {pixels:,} pixels; at most {MAX_DECODED_PIXELS:,} pixels are decoded "
            "in all; cut it, or scale it down"
        )


def limit_process() -> None:
    """Limit this decoding process to `MAX_MEMORY` more than it has now, and to no core file where it crashes.

    Beyond the limit, a decoder fails with an error of its own.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    status = Path("/proc/self/status")
    if not status.exists():  # only Linux counts this memory
        return
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    limit, hard = int(line.split()[1]) * 1024 + MAX_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
