"""Where a step's clips are at hand: the fastest memory that has room for them, by what is free on each node."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_cache import ClipCache, EntrySpec
from avcil_dist.data.manifest import Manifest
from avcil_dist.world import World

SHARE = 0.5  # of what is free; the rest is for the training itself
CGROUPS = Path("/sys/fs/cgroup")
# By controller, as a line of /proc/self/cgroup names it (version 2 names none): limit, use, and what can be dropped.
LIMITS = {
    "": (CGROUPS, "memory.max", "memory.current", "inactive_file"),
    "memory": (CGROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def place_clip_cache(
    manifest: Manifest, data: DataConfig, clips: np.ndarray, world: World, device: torch.device
) -> tuple[ClipCache | None, str]:
    """A store for as many of these clips (ascending) as there is room for, None for none; and what to say of it.

    All ranks call it. Those of a node share one in host memory.
    """
    if data.clip_cache == "none" or not len(clips):
        return None, "clips at hand: none"
    kind = EntrySpec.of(manifest, data.clip)
    counts = _counts(len(clips), sum(kind.sizes), world, device)
    tier = data.clip_cache if data.clip_cache != "auto" else _fastest(counts, len(clips), device)
    kept = clips[: counts[tier]]
    store = None
    if len(kept):
        store = ClipCache(kept, kind, device) if tier == "device" else _shared(kept, kind, world)
        if store is None:
            return None, "clips at hand: none, for the ranks of a node cannot share memory"
    size = len(kept) * sum(kind.sizes) / 1e9
    return store, f"clips at hand: {tier} memory, {len(kept):,} of {len(clips):,} clips, {size:.1f} GB"


def free_host_bytes() -> int:
    """Host memory that can still be had: of the machine, and of the control groups of this process."""
    info = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = [int(info["MemAvailable"].split()[0]) * 1024]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controller, own = line.split(":", 2)
        if controller in LIMITS:
            free += _free_in_group(own.lstrip("/"), *LIMITS[controller])
    return min(free)


def _free_in_group(own: str, root: Path, limit: str, use: str, droppable: str) -> list[int]:
    """What a control group and those around it leave, each that has a limit."""
    free = []
    for folder in (root / own, *(root / own).parents):
        if not (folder.is_relative_to(root) and (folder / limit).exists()):
            continue
        said = (folder / limit).read_text().strip()
        if said != "max":
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / use).read_text()) - int(statistics[droppable])
            free.append(max(0, int(said) - used))
    return free


def _counts(wanted: int, row_bytes: int, world: World, device: torch.device) -> dict[str, int]:
    """How many clips each tier has room for, on every node and rank."""
    host = int(SHARE * free_host_bytes())
    on_device = int(SHARE * torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else host // world.local_size
    told = [(0, 0)] * world.size
    dist.all_gather_object(told, (on_device // row_bytes, host // row_bytes))
    return {name: min(wanted, *(room[number] for room in told)) for number, name in enumerate(("device", "host"))}


def _fastest(counts: dict[str, int], wanted: int, device: torch.device) -> str:
    """The device if all fits there, else the tier that holds more; without a GPU, host memory is what there is."""
    if device.type != "cuda":
        return "host"
    return "host" if counts["device"] < wanted and counts["host"] > counts["device"] else "device"


def _shared(clips: np.ndarray, kind: EntrySpec, world: World) -> ClipCache | None:
    """The node's store: its first rank makes it, the others map it. None on all ranks of all nodes where one cannot."""
    store = ClipCache(clips, kind, None) if world.local_rank == 0 else None
    paths: list[str] = [""] * world.size
    dist.all_gather_object(paths, store.memory.path if store else "")
    if store is None:
        try:
            store = ClipCache(clips, kind, None, paths[world.rank - world.local_rank])
        except OSError:
            store = None  # another container, perhaps
    can: list[bool] = [False] * world.size
    dist.all_gather_object(can, store is not None)
    return store if all(can) else None
