from pathlib import Path

import pytest
import torch

from avcil_dist.config import ClipConfig
from avcil_dist.data.decode import decode_clip
from avcil_dist.data.manifest import load_manifest
from avcil_dist.data.transforms import ClipTransform
from data_shards.build import build_shards
from data_shards.verify import verify_shards

torch.set_num_threads(1)
CLIPS = Path(__file__).parents[2].parent / "shared" / "data" / "real_clips"

# the audio track of this clip is there, and holds digital silence only: every one of its AAC packets is empty
SOUNDLESS: dict[str, set[str]] = {"vas": set(), "music": {"Us9dxgfBfeo_82-97"}}


@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"{CLIPS} is absent: no real clips to build from")
@pytest.mark.parametrize(("folder", "count", "classes"), [("vas", 10, 7), ("music", 80, 11)])
def test_real_clips_are_built_verified_decoded_and_transformed(
    tmp_path: Path, folder: str, count: int, classes: int
) -> None:
    report = build_shards(CLIPS / folder, str(tmp_path), clips_per_shard=8, min_seconds=4.0, processes=2, strict=True)
    assert report.rejected == ()
    manifest = load_manifest(report.manifest_url)
    assert len(manifest.classes) == classes
    assert sum(shard.count for shard in manifest.shards) == count
    assert verify_shards(report.manifest_url) == []

    soundless = set()
    transform = ClipTransform(ClipConfig(frames=8, size=112))
    for number, shard in enumerate(manifest.shards):
        content = Path(manifest.url(number)).read_bytes()
        for key, offset, size in zip(shard.keys, shard.offsets["mp4"], shard.sizes["mp4"], strict=True):
            data = content[offset : offset + size]
            visual, audio = transform(decode_clip(data, num_frames=8, sample_rate=16000, silent="error", where=key))
            assert visual.shape == (8, 3, 112, 112)
            assert audio.shape == (1024, 128)
            assert torch.isfinite(visual).all()
            assert torch.isfinite(audio).all()
            if audio[:400].std() == 0:
                soundless.add(key)
    assert soundless == SOUNDLESS[folder]
