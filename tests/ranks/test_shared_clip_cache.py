"""The ranks of a node share a clip cache in host memory; on a device each rank has its own."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from avcil_dist.config.schema import DataConfig
from avcil_dist.data.clip_cache import ClipCache, EntrySpec
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import Request
from avcil_dist.training import clip_cache_placement
from avcil_dist.training.clip_cache_placement import place_clip_cache
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.ranks import CPU, run_ranks

CLIPS = np.arange(6)


def found(world: World, url: str) -> dict[str, tuple[str, int]]:
    """By tier: the message, and how many of the clips that rank 0 has added this rank finds."""
    manifest, results = load_manifest(url), {}
    for tier in ("auto", "host", "device", "none"):
        data = DataConfig.model_validate({"manifest": url, "clip_cache": tier})
        cache, message = place_clip_cache(manifest, data, CLIPS, world, CPU)
        if cache and world.rank == 0:
            rows = torch.ones(4, 2, 3, 16).half(), torch.ones(4, 16).half()
            cache.put(CLIPS[:4], rows, np.array([True, True, False, True]))
        dist.barrier()
        results[tier] = message, len(CLIPS) - len(cache.mark_missing(Request(CLIPS, 6)).to_read.clips) if cache else 0
        dist.barrier()  # until then another rank may look
    return results


def found_from_another_container(world: World, url: str) -> tuple[bool, str]:
    """Whether this rank has a cache, and the message, where rank 1 does not see the file of rank 0."""

    class CacheOfAContainer(ClipCache):
        def __init__(self, clips: np.ndarray, spec: EntrySpec, device: None, path: str | None = None) -> None:
            super().__init__(clips, spec, device, path and f"/nowhere/{path}")

    clip_cache_placement.ClipCache = CacheOfAContainer  # type: ignore[misc, attr-defined]  # in this process alone
    data = DataConfig.model_validate({"manifest": url, "clip_cache": "host"})
    cache, message = place_clip_cache(load_manifest(url), data, CLIPS, world, CPU)
    return cache is not None, message


def found_below_a_limit(world: World, url: str) -> tuple[bool, str]:
    """Whether this rank has a cache, and the message, where rank 0 may not make files of its size."""
    data = DataConfig.model_validate({"manifest": url, "clip_cache": "host"})
    manifest = load_manifest(url)
    if world.rank == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    cache, message = place_clip_cache(manifest, data, CLIPS, world, CPU)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return cache is not None, message


@pytest.mark.parametrize("processes", [1, 2])
def test_a_limit_on_the_size_of_files_leaves_no_cache(tmp_path: Path, processes: int) -> None:
    url = make_feature_shards(tmp_path, classes=1, clips={"train": 6})
    none = False, "clip cache: none, because the ranks of a node cannot share memory"
    assert run_ranks(found_below_a_limit, processes, url) == [none] * processes


def test_no_rank_of_a_node_has_a_cache_if_one_cannot_map_it(tmp_path: Path) -> None:
    url = make_feature_shards(tmp_path, classes=1, clips={"train": 6})
    none = False, "clip cache: none, because the ranks of a node cannot share memory"
    assert run_ranks(found_from_another_container, 2, url) == [none, none]


def test_ranks_share_host_memory(tmp_path: Path) -> None:
    url = make_feature_shards(tmp_path, classes=1, clips={"train": 6})
    first, second = run_ranks(found, 2, url)
    host = "clip cache: host memory, 6 of 6 clips, 0.0 GB"
    assert first["auto"] == first["host"] == second["auto"] == second["host"] == (host, 3)
    assert (first["device"][1], second["device"][1]) == (3, 0)
    assert first["none"] == second["none"] == ("clip cache: none", 0)
