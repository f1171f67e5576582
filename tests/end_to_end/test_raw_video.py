"""Transformers trained on videos through the command line: they learn, and what is frozen in them stays to the bit."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from avcil_dist.compose import load_config
from avcil_dist.config.encoders import AudioMAEConfig
from avcil_dist.config.schema import ClipConfig
from avcil_dist.models.encoders.build import build_audio_encoder
from avcil_dist.streams.artifact import load_artifact
from tests.helpers.ranks import run_ranks
from tests.helpers.rendered import tiny_manifest
from tests.helpers.streams import avcil, run_streams, train

CLIP = {"frames": 4, "size": 32, "mel_bins": 32, "mel_frames": 96, "mel_mean": -6.0, "mel_std": 4.0}
TINY = {"dim": 48, "depth": 2, "heads": 2}
NAMES = ("cat", "dog", "cow", "hen")
CHANCE = 1 / len(NAMES)


@pytest.fixture
def pretrained(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A checkpoint of an AudioMAE with its decoder, in a file; what an encoder takes of it."""
    torch.manual_seed(1)
    config = AudioMAEConfig.model_validate({"kind": "audiomae", "weights": "random", **TINY})
    state = build_audio_encoder(config, ClipConfig.model_validate(CLIP), None).body.state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 48)}
    save_file(state | decoder, tmp_path / "audiomae.safetensors")
    return state


def test_transformers_learn_two_steps_of_videos_and_leave_alone_what_is_not_theirs_to_train(
    tmp_path: Path, pretrained: dict[str, torch.Tensor]
) -> None:
    manifest = tiny_manifest(tmp_path / "shards", NAMES, {"train": 16, "val": 4, "test": 8})
    weights = str(tmp_path / "audiomae.safetensors")
    document = {
        "extends": "base",
        "name": "video",
        "output": str(tmp_path / "runs"),
        "data": {
            "manifest": f"{manifest.root}/manifest.json",
            "clip": CLIP,
            "augment": {"crop": 0.5, "flip": 0.5, "time_mask": 16, "mel_mask": 4},
        },
        "scenario": {"classes_per_step": 2},
        "model": {
            "visual": {"kind": "videomae", "weights": "random", "train": "full", **TINY},
            "audio": {"kind": "audiomae", "weights": weights, "train": "partial", "last_blocks": 1, **TINY},
        },
        "memory": {"size": 8},
        "optim": {
            "epochs": 6,
            "global_batch": 8,
            "global_replay_batch": 4,
            "global_eval_batch": 16,
            "lr": 0.002,
            "layer_decay": 0.75,
        },
    }
    (tmp_path / "video.yaml").write_text(yaml.safe_dump(document))
    stream = train(tmp_path / "video.yaml", "-n", 2)

    first, second = load_artifact(stream, 0), load_artifact(stream, 1)
    assert all(accuracy > 2 * CHANCE for accuracy in second.metrics.accuracy[1])
    assert second.metrics.num_test_clips == 4 * 8
    trained = ("blocks.1.", "norm.")
    for name, value in pretrained.items():
        states = [artifact.model[f"audio_encoder.body.{name}"] for artifact in (first, second)]
        for state in states:
            assert torch.equal(state, value) is not name.startswith(trained), name
    (tmp_path / "audiomae.safetensors").unlink()  # an artifact holds all of its weights
    evaluated = avcil("eval", stream)
    assert evaluated.exit_code == 0, evaluated.output
    assert json.loads(evaluated.output)["seen_accuracy"] == pytest.approx(second.metrics.seen_accuracy[-1])
    videomae = [name for name in first.model if name.startswith("visual_encoder.")]
    assert not [name for name in videomae if torch.equal(first.model[name], second.model[name])]


def test_adapters_train_at_step_0_and_the_merged_encoders_stay(
    tmp_path: Path, pretrained: dict[str, torch.Tensor]
) -> None:
    manifest = tiny_manifest(tmp_path / "shards", NAMES[:3], {"train": 4, "val": 1, "test": 1})
    adapters = {"train": "adapters", "adapter_rank": 3, **TINY}
    document = {
        "extends": "base",
        "name": "adapters",
        "output": str(tmp_path / "runs"),
        "data": {"manifest": f"{manifest.root}/manifest.json", "clip": CLIP},
        "scenario": {"classes_per_step": [2, 1]},
        "model": {
            "visual": {"kind": "videomae", "weights": "random", **adapters},
            "audio": {"kind": "audiomae", "weights": str(tmp_path / "audiomae.safetensors"), **adapters},
        },
        "memory": {"size": 4},
        "optim": {"epochs": 2, "global_batch": 4, "global_replay_batch": 2, "global_eval_batch": 4, "lr": 0.002},
    }
    (tmp_path / "adapters.yaml").write_text(yaml.safe_dump(document))
    [[stream]] = run_ranks(run_streams, 1, [load_config(str(tmp_path / "adapters.yaml"), ["method=ssil"])], range(2))
    first, second = (load_artifact(stream, step).model for step in range(2))
    encoders = [name for name in first if "_encoder." in name]
    assert all(torch.equal(first[name], second[name]) for name in encoders)
    assert not torch.equal(first["audio_proj.weight"], second["audio_proj.weight"])
    changes = {name: first[f"audio_encoder.body.{name}"] - value for name, value in pretrained.items()}
    ranks = {name: int(torch.linalg.matrix_rank(change, rtol=1e-3)) for name, change in changes.items() if change.any()}
    assert set(ranks) == {name for name in pretrained if name.startswith("blocks.") and pretrained[name].ndim == 2}
    assert set(ranks.values()) == {3}
