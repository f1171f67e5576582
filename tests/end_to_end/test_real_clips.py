from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import ClipConfig, DataConfig
from avcil_dist.data.batch import Batch
from avcil_dist.data.loader import load_batches
from avcil_dist.data.manifest import Manifest, load_manifest
from avcil_dist.data.sampler import FixedSampler
from data_shards.build import build_part
from data_shards.build_plan import Part, merge_parts
from data_shards.features import make_features
from data_shards.verify import verify_shards
from tests.helpers.data import needs_published, published
from tests.helpers.rendered import write_wild_clips

torch.set_num_threads(1)

# the audio track of this clip is there, and holds digital silence only: every one of its AAC packets is empty
SOUNDLESS: dict[str, set[str]] = {"vas": set(), "music": {"Us9dxgfBfeo_82-97"}, "wild": {"Us9dxgfBfeo_82-97"}}


ENCODERS = (
    "data.decode_workers=0",
    "data.clip.frames=4",
    "data.clip.size=32",
    *(f"model.visual.{word}" for word in ("weights=random", "dim=32", "depth=1", "heads=2")),
    *(f"model.audio.{word}" for word in ("weights=random", "dim=32", "depth=1", "heads=2")),
)


def _batches(manifest: Manifest, data: DataConfig) -> list[Batch]:
    labels = {name: number for number, name in enumerate(manifest.classes)}
    source = FixedSampler(np.arange(int(manifest.first_clips[-1])).reshape(-1, 10))
    return list(load_batches(source, manifest=manifest, labels=labels, data=data))


def test_clips_rendered_as_in_the_wild_go_all_the_way(tmp_path: Path) -> None:
    _build_verify_and_load(write_wild_clips(tmp_path / "wild"), tmp_path, 10, 4)


@needs_published("real_clips")
@pytest.mark.parametrize(("folder", "count", "classes"), [("vas", 10, 7), ("music", 80, 11)])
def test_real_clips_are_built_verified_made_into_features_and_loaded(
    tmp_path: Path, folder: str, count: int, classes: int
) -> None:
    _build_verify_and_load(published("real_clips") / folder, tmp_path, count, classes)


def _build_verify_and_load(clips: Path, tmp_path: Path, count: int, classes: int) -> None:
    output = f"{tmp_path}/clips"
    for index in range(2):
        part = Part(index, 2)
        assert build_part(clips, output, part, clips_per_shard=8, min_seconds=4.0, processes=2) is None
    report = merge_parts(output, strict=True)
    assert report.rejected == ()
    manifest = load_manifest(report.manifest_url)
    assert len(manifest.classes) == classes
    assert sum(shard.count for shard in manifest.shards) == count
    assert verify_shards(report.manifest_url, processes=2) == []

    # the encoders' weights are random here: what is shown is that real clips go all the way
    config = load_config("features", (*ENCODERS, f"data.manifest={report.manifest_url}"))
    features = make_features(config, f"{tmp_path}/features", batch=8, device=torch.device("cpu"))
    assert features.rejected == ()
    assert [shard.keys for shard in features.manifest.shards] == [shard.keys for shard in manifest.shards]
    assert verify_shards(features.manifest_url) == []

    clip = ClipConfig(frames=8, size=112)
    soundless = set()
    for number, batch in enumerate(_batches(manifest, DataConfig(manifest="clips", clip=clip))):
        assert batch.faults == ()
        assert batch.valid.all()
        assert batch.visual.shape == (10, 8, 3, 112, 112)
        assert batch.audio.shape == (10, 1024, 128)
        assert torch.isfinite(batch.visual).all()
        assert torch.isfinite(batch.audio).all()
        soundless |= {manifest.key(10 * number + row) for row in range(10) if batch.audio[row, :400].std() == 0}
    assert soundless == SOUNDLESS[clips.name]
    for batch in _batches(load_manifest(features.manifest_url), DataConfig(manifest="features")):
        assert batch.faults == ()
        assert batch.visual.shape == (10, 2, 4, 32)
        assert batch.audio.shape == (10, 32)
        assert torch.isfinite(batch.visual).all()
