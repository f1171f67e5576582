"""Small streams on feature shards: a configuration file, and runs of it through the command line."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.stream import stream_url
from avcil_dist.system.signals import StopRequest
from avcil_dist.tracking.session import publish_step, stream_run, track_step
from avcil_dist.training.observer import Observer
from avcil_dist.training.step import step_in_group
from avcil_dist.world import World
from data_shards.random_features import make_feature_shards
from launch.cli.main import cli
from launch.progress import ProgressBar
from launch.step_run import MetricsObserver

CLASSES, STEPS = 6, [3, 2, 1]


def write_config(folder: Path, **changes: object) -> Path:
    """Feature shards of 6 classes, and a configuration of 3 unequal steps over them, with sections changed."""
    manifest = folder / "shards" / "manifest.json"
    if not manifest.exists():
        make_feature_shards(folder / "shards", classes=CLASSES, clips={"train": 24, "val": 6, "test": 10})
    document: dict[str, object] = {
        "extends": "base",
        "name": "tiny",
        "output": str(folder / "runs"),
        "data": {"manifest": str(manifest)},
        "scenario": {"classes_per_step": STEPS},
        "model": {"visual": {"kind": "precomputed"}, "audio": {"kind": "precomputed"}},
        "memory": {"size": 30},
        "optim": {"epochs": 12, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 0.003},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(document | changes))
    return path


def avcil(*words: object) -> Result:
    """Run the command in this process; its ranks are processes of their own."""
    return CliRunner().invoke(cli, [str(word) for word in words])


def train(config: Path, *words: object) -> str:
    """Train a stream that must succeed. Returns its folder."""
    result = avcil("train", config, *words)
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[-1].split(":")[0]


def last_artifact(stream: str) -> StepArtifact:
    """Return the artifact of the last step."""
    return load_artifact(stream, len(STEPS) - 1)


def weights_digest(stream: str, step: int = len(STEPS) - 1) -> str:
    """The digest of a step's weights."""
    return storage.sha256_file(f"{stream}/step_{step:03d}/model.safetensors")


def run_steps(world: World, config: Config, steps: Iterable[int]) -> str:
    """Run steps of a stream within the existing process group. Returns the stream's folder."""
    for step in steps:
        _run_step(world, config, step)
    return stream_url(config)


def run_streams(world: World, configs: Sequence[Config], steps: Sequence[int] = range(len(STEPS))) -> list[str]:
    """Run these steps of several streams, one stream after the other. Returns their folders."""
    return [run_steps(world, config, steps) for config in configs]


def run_tracked(world: World, configs: Sequence[Config], steps: Sequence[int] = range(len(STEPS))) -> list[str]:
    """`run_streams` with MLflow tracking, as `avcil train` runs them."""
    for config in configs:
        with stream_run(config, is_main=True):
            for step in steps:
                with track_step(config, step) as tracker, ProgressBar(config.stream_name, len(STEPS)) as bar:
                    _run_step(world, config, step, bar, MetricsObserver(tracker))
                    publish_step(config, tracker, len(STEPS))
    return [stream_url(config) for config in configs]


def _run_step(world: World, config: Config, step: int, *observers: Observer) -> None:
    step_in_group(config, step, world=world, observers=observers, device=torch.device("cpu"), stop=StopRequest())


def check_same_metrics(found: StreamMetrics, expected: StreamMetrics) -> None:
    """Check that streams on different numbers of ranks have the same metrics; the sums of losses are rounded apart."""
    for ours, theirs in zip(found.epochs, expected.epochs, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-4, abs=1e-5)
        assert replace(ours, loss=theirs.loss) == theirs
    assert replace(found, epochs=expected.epochs) == expected
