"""Exemplars of far shards are copied to each machine once; the result is that of local shards."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.sampler import FixedSampler, TrainingSampler
from avcil_dist.streams.artifact import load_artifact
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.exemplar_copies import RedirectedRequests, copy_clips, local_exemplars, with_copies
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import run_streams, write_config


def far(config: Path) -> str:
    """The same shards behind a file system that is not the machine's own."""
    return f"data.manifest=simplecache::file://{config.parent}/shards/manifest.json"


def test_copies_are_the_clips_under_other_numbers(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=3, clips={"train": 20}))
    exemplars = np.array([7, 2, 45, 41, 59])
    folder = tmp_path / "copies"
    folder.mkdir()
    copy_clips(manifest, exemplars, folder, seconds=1)
    joined, numbers = with_copies(manifest, load_manifest(f"{folder}/manifest.json"))
    assert sorted(numbers) == sorted(exemplars)
    assert set(numbers.values()) == set(range(60, 65))
    assert {shard.class_name for shard in joined.shards[-2:]} == {"class_000", "class_002"}
    assert len(list(folder.glob("*.bin"))) == 2

    source = FixedSampler(np.array([[1, 7, 45, 2], [59, 20, 41, 0]]))
    labels = {name: number for number, name in enumerate(manifest.classes)}
    data = load_config(str(write_config(tmp_path))).data
    originals = list(load_batches(source, manifest=manifest, labels=labels, data=data))
    for path in (tmp_path / "shards").rglob("*train*"):  # the originals are not read for what is copied
        if "class_002" in str(path):
            path.unlink()
    copies = list(load_batches(RedirectedRequests(source, numbers), manifest=joined, labels=labels, data=data))
    for original, copy in zip(originals, copies, strict=True):
        assert copy.valid.all()
        assert torch.equal(copy.visual, original.visual)
        assert torch.equal(copy.audio, original.audio)
        assert torch.equal(copy.labels, original.labels)


def test_a_clip_that_cannot_be_read_is_not_copied(tmp_path: Path) -> None:
    manifest = load_manifest(make_feature_shards(tmp_path / "shards", classes=2, clips={"train": 5}))
    Path(manifest.url(1)).unlink()
    copy_clips(manifest, np.array([0, 1, 7]), tmp_path, seconds=1)
    _, numbers = with_copies(manifest, load_manifest(f"{tmp_path}/manifest.json"))
    assert numbers == {0: 10, 1: 11}


@pytest.mark.parametrize("method", ["ssil", "icarl"])
def test_a_stream_from_far_shards_gives_the_bits_of_local_ones(tmp_path: Path, method: str) -> None:
    path = write_config(
        tmp_path, optim={"epochs": 2, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16}
    )
    near = load_config(str(path), [f"method={method}"])
    away = load_config(str(path), [f"method={method}", far(path), f"output={tmp_path}/far"])
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
        folders = sorted({str(Path(shard.url).parent) for shard in copied})
        assert all(Path(folder).is_dir() for folder in folders)
        redirected = isinstance(requests, RedirectedRequests)
        torch.distributed.barrier()
    torch.distributed.barrier()
    return redirected, folders, [Path(folder).exists() for folder in folders]


def test_the_ranks_of_a_machine_share_one_copy_and_it_goes_with_the_step(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    config = load_config(str(path), [far(path)])
    first, second = run_ranks(where_exemplars_are, 2, config, [0, 1, 41])
    assert first == second
    redirected, [folder], after = first
    assert redirected
    assert Path(folder).parent == Path(tempfile.gettempdir())
    assert after == [False]


def test_local_shards_and_an_empty_memory_are_not_copied(tmp_path: Path) -> None:
    path = write_config(tmp_path)
    assert run_ranks(where_exemplars_are, 1, load_config(str(path)), [0, 1]) == [(False, [], [])]
    assert run_ranks(where_exemplars_are, 1, load_config(str(path), [far(path)]), []) == [(False, [], [])]
