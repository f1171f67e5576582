"""Placement of the clip cache: GPU memory, shared host memory or none, chosen from free memory on all nodes."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_cache import ClipCache, EntrySpec
from avcil_dist.data.inputs import ClipInputs
from avcil_dist.data.manifest import Manifest
from avcil_dist.training.collectives import gather_json
from avcil_dist.world import World

SHARE = 0.5  # of free memory; the rest is for the training itself
PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")
# By controller, as named in a line of /proc/self/cgroup (version 2 names none): limit, usage, and reclaimable pages.
LIMITS = {
    "": (CGROUPS, "memory.max", "memory.current", "inactive_file"),
    "memory": (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def place_clip_cache(
    manifest: Manifest,
    data: DataConfig,
    clips: np.ndarray,
    world: World,
    device: torch.device,
    inputs: ClipInputs | None = None,
) -> tuple[ClipCache | None, str]:
    """Create a cache for as many of these clips (ascending) as fit; None for none. Also returns a line for the log.

    All ranks call it. The ranks of a node share one cache in host memory. `inputs` is as in `load_batches`.
    """
    if data.clip_cache == "none" or not len(clips):
        return None, "clip cache: none"
    entry = EntrySpec.of(manifest, inputs or ClipInputs.of(data.clip))
    counts = _counts(len(clips), sum(entry.sizes), world, device)
    tier = data.clip_cache if data.clip_cache != "auto" else _fastest(counts, len(clips), device)
    cached = clips[: counts[tier]].copy()  # a view would keep all of them
    cache = None
    if len(cached):
        cache = ClipCache(cached, entry, device) if tier == "device" else _shared(cached, entry, world)
        if cache is None:
            return None, "clip cache: none, because the ranks of a node cannot share memory"
    size = len(cached) * sum(entry.sizes) / 1e9
    return cache, f"clip cache: {tier} memory, {len(cached):,} of {len(clips):,} clips, {size:.1f} GB"


def free_host_bytes() -> int:
    """Return the host memory that is still available, by the machine and by the control groups of this process."""
    info = dict(line.split(":") for line in (PROC / "meminfo").read_text().splitlines())
    free = [int(info["MemAvailable"].split()[0]) * 1024]
    for line in (PROC / "self" / "cgroup").read_text().splitlines():
        _, controller, own = line.split(":", 2)
        if controller in LIMITS:
            free += _free_in_group(own.lstrip("/"), *LIMITS[controller])
    return min(free)


def _free_in_group(own: str, root: Path, limit: str, use: str, droppable: str) -> list[int]:
    """Return the free memory of a control group and of each of its parents that has a limit."""
    free = []
    for folder in (root / own, *(root / own).parents):
        if not (folder.is_relative_to(root) and (folder / limit).exists()):
            continue
        maximum = (folder / limit).read_text().strip()
        if maximum != "max":
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / use).read_text()) - int(statistics[droppable])
            free.append(max(0, int(maximum) - used))
    return free


def _counts(wanted: int, row_bytes: int, world: World, device: torch.device) -> dict[str, int]:
    """Return the number of clips that fit in each tier, on every node and rank."""
    host = int(SHARE * free_host_bytes())
    on_device = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host // world.local_size
    rooms: list[tuple[int, int]] = gather_json((on_device // row_bytes, host // row_bytes))
    return {name: min(wanted, *(room[number] for room in rooms)) for number, name in enumerate(("device", "host"))}


def _fastest(counts: dict[str, int], wanted: int, device: torch.device) -> str:
    """Return the device if all clips fit there, else the tier that holds more. Without a GPU it is host memory."""
    if device.type != "cuda":
        return "host"
    return "host" if counts["device"] < wanted and counts["host"] > counts["device"] else "device"


def _shared(clips: np.ndarray, entry: EntrySpec, world: World) -> ClipCache | None:
    """Create the node's cache on its first rank, and map it on the others. None on all ranks if one cannot."""
    cache = None
    with suppress(OSError):  # a limit on the size of files (ulimit -f) applies to this memory too
        cache = ClipCache(clips, entry, None) if world.local_rank == 0 else None
    paths: list[str] = gather_json(cache.memory.path if cache else "")
    if cache is None:
        with suppress(OSError):  # for example a rank in another container, or no path
            cache = ClipCache(clips, entry, None, paths[world.rank - world.local_rank])
    return cache if all(gather_json(cache is not None)) else None
