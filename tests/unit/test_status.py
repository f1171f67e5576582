"""Status of a chain, read from its record and from committed steps."""

import json
from pathlib import Path

import pytest

from avcil_dist.errors import ArtifactError
from avcil_dist.streams.artifact import step_url
from avcil_dist.streams.commit import write_commit, write_files
from avcil_dist.streams.metrics import StreamMetrics
from launch.cluster.chain_record import Chain, write_chain
from launch.cluster.status import chain_status

METRICS = StreamMetrics(1, ((0.9,), (0.5, 0.8)), (0.9, 0.625), {}, 10, 3, None)


def make_chain(stream: Path) -> None:
    """A chain of three steps on this machine, two of them committed."""
    write_chain(str(stream), Chain(kind="local", name="tiny", folder=str(stream / "jobs"), num_steps=3))
    first = StreamMetrics(0, ((0.9,),), (0.9,), {}, 5, 3, None)
    for metrics in (first, METRICS):
        folder = step_url(str(stream), metrics.step)
        data = json.dumps(metrics.to_dict()).encode()
        write_commit(folder, write_files(folder, {"metrics.json": data}), step=metrics.step)


def test_committed_steps_have_their_seen_accuracy(tmp_path: Path) -> None:
    make_chain(tmp_path)
    _, steps = chain_status(str(tmp_path))
    assert [step.state for step in steps] == ["COMMITTED", "COMMITTED", "NOT SUBMITTED"]
    assert [step.seen_accuracy for step in steps] == [0.9, 0.625, None]


def test_changed_metrics_of_a_committed_step_are_refused_by_name(tmp_path: Path) -> None:
    make_chain(tmp_path)
    path = tmp_path / "step_001" / "metrics.json"
    path.write_text(path.read_text().replace("0.625", "0.925"))
    with pytest.raises(ArtifactError, match=r"step_001/metrics\.json: damaged"):
        chain_status(str(tmp_path))
