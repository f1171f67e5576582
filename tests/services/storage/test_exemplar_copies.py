"""Exemplars in object storage are copied to each machine once; the result is that of local shards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import TrainingSampler
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.exemplar_copies import RedirectedRequests, local_exemplars
from avcil_dist.world import World
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import run_streams, write_config


def far(config: Path, s3: str) -> str:
    """Copy the shards beside a configuration into a bucket; the setting that leads to them."""
    shards = config.parent / "shards"
    for path in shards.rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3}/{path.relative_to(shards)}", path.read_bytes())
    return f"data.manifest={s3}/manifest.json"


@pytest.mark.parametrize("method", ["ssil", "icarl"])
def test_a_stream_from_far_shards_gives_the_bits_of_local_ones(tmp_path: Path, s3: str, method: str) -> None:
    path = write_config(
        tmp_path, optim={"epochs": 2, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16}
    )
    near = load_config(str(path), [f"method={method}"])
    away = load_config(str(path), [f"method={method}", far(path, s3), f"output={tmp_path}/far"])
    [[one], *_] = run_ranks(run_streams, 2, [near])
    [[two], *_] = run_ranks(run_streams, 2, [away])
    for name, weight in load_artifact(one, 2).model.items():
        assert torch.equal(load_artifact(two, 2).model[name], weight), name


def where_exemplars_are(world: World, config: Config, exemplars: Sequence[int]) -> tuple[bool, list[str], list[bool]]:
    """Whether clips are redirected; the folders of the copies, in the block and which are there after it."""
    manifest = load_manifest(config.data.manifest)
    source = TrainingSampler(
        manifest=manifest,
        classes=scenario_of(config, manifest).new(1),
        exemplars=np.array(exemplars, dtype=np.int64),
        data=config.data,
        optim=config.optim,
        seed=0,
        step=1,
        world=world,
    )
    with local_exemplars(source) as (requests, joined):
        copied = joined.shards[len(manifest.shards) :]
        folders = sorted({str(shard.root) for shard in copied})
        assert all(Path(folder).is_dir() for folder in folders)
        redirected = isinstance(requests, RedirectedRequests)
        torch.distributed.barrier()
    torch.distributed.barrier()
    return redirected, folders, [Path(folder).exists() for folder in folders]


def test_the_ranks_of_a_machine_share_one_copy_and_it_goes_with_the_step(tmp_path: Path, s3: str) -> None:
    path = write_config(tmp_path)
    config = load_config(str(path), [far(path, s3)])
    first, second = run_ranks(where_exemplars_are, 2, config, [0, 1, 41])
    assert first == second
    redirected, [folder], after = first
    assert redirected
    assert Path(folder).parent == Path(tempfile.gettempdir())
    assert after == [False]


def test_local_shards_and_an_empty_memory_are_not_copied(tmp_path: Path, s3: str) -> None:
    path = write_config(tmp_path)
    assert run_ranks(where_exemplars_are, 1, load_config(str(path)), [0, 1]) == [(False, [], [])]
    assert run_ranks(where_exemplars_are, 1, load_config(str(path), [far(path, s3)]), []) == [(False, [], [])]
