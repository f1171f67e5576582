"""Shares of attention and evidence on known regions: the same on any number of ranks, and those of the figure."""

from pathlib import Path

import numpy as np
import pytest
import torch

from avcil_dist.config.schema import Config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.inference.attention import prepare_clips
from avcil_dist.methods import make_method
from avcil_dist.models.encoders.build import clip_inputs
from avcil_dist.models.network import AudioVisualNetwork, build_network
from avcil_dist.streams.region_shares import RegionShares
from avcil_dist.streams.stream import scenario_of
from avcil_dist.training.clip_maps import clip_maps, region_shares
from avcil_dist.training.incremental_step import Step
from avcil_dist.world import World
from data_shards.build import build_shards
from data_shards.synthetic import sounding_region
from tests.helpers.ranks import CPU, run_ranks
from tests.helpers.rendered import SyntheticSpec, render_tiny

SPEC = SyntheticSpec(3, {"train": 1, "val": 1, "test": 3}, seconds=1.0, size=32, frames_per_second=8)


def config_of(root: Path, fusion: str) -> Config:
    return Config.model_validate(
        {
            "name": "tiny",
            "data": {
                "manifest": f"{root}/shards/manifest.json",
                "decode_workers": 0,
                "clip": {"frames": 4, "size": 32, "mel_bins": 32, "mel_frames": 96},
            },
            "scenario": {"classes_per_step": [1, 2]},
            "model": {
                "visual": {"kind": "small", "dim": 16},
                "audio": {"kind": "small", "dim": 16},
                "fusion": fusion,
            },
            "method": {"name": "finetune"},
        }
    )


def network_of(config: Config, num_classes: int) -> AudioVisualNetwork:
    torch.manual_seed(0)
    network = build_network(config.model, config.data.clip, {}, num_classes)
    assert isinstance(network, AudioVisualNetwork)
    return network


def shares(world: World, config: Config, step: int) -> RegionShares | None:
    manifest = load_manifest(config.data.manifest)
    scenario = scenario_of(config, manifest)
    network = network_of(config, scenario.num_seen(step))
    restored = Step(config, manifest, scenario, step, make_method(config.method), world, CPU)
    return region_shares(restored, network, restored.inference())


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_shares_are_those_of_each_clip_on_any_number_of_ranks(tmp_path: Path, fusion: str) -> None:
    render_tiny(tmp_path / "clips", classes=3, train=1, val=1, test=3)
    build_shards(tmp_path / "clips" / "clips.csv", f"{tmp_path}/shards", clips_per_shard=8, min_seconds=0.1)
    config = config_of(tmp_path, fusion)
    network = network_of(config, 3).eval()
    expected = []
    for label in range(3):
        for index in range(3):
            url = str(tmp_path / "clips" / "test" / f"class_{label:03d}" / f"test-{label:03d}-{index:05d}.mp4")
            [clip] = prepare_clips([url], clip_inputs(config.model, config.data.clip))
            maps = clip_maps(network, make_method(config.method), clip.visual, clip.audio, label)
            region = sounding_region(SPEC, "test", label, index)
            evidence = maps.evidence.share(region) if maps.evidence.mass.any() else np.nan
            assert maps.attention.mass.sum() == pytest.approx(1)
            expected.append((label, maps.attention.share(region), evidence))
    rows = np.array(expected)
    for num_ranks in (1, 2) if fusion == "sum" else (2,):
        for found in run_ranks(shares, num_ranks, config, 1):
            assert (found.num_clips, found.area) == (9, 0.25)
            [attention], [evidence], [with_evidence] = found.attention, found.evidence, found.with_evidence
            for task, members in enumerate((rows[:3], rows[3:])):
                assert attention[task] == pytest.approx(members[:, 1].mean(), rel=1e-6)
                has_evidence = np.isfinite(members[:, 2])
                assert with_evidence[task] == has_evidence.mean()
                mean = members[has_evidence, 2].mean() if has_evidence.any() else None
                assert evidence[task] == (mean and pytest.approx(mean, rel=1e-6))
