"""Publication of committed steps by the jobs of a chain, wherever a kill has ended an earlier job."""

import json
from pathlib import Path

import pytest

from avcil_dist.config.schema import Config
from avcil_dist.streams.stream import stream_url
from avcil_dist.streams.summary import load_summary
from avcil_dist.tracking.events import STREAM
from avcil_dist.tracking.session import open_run
from avcil_dist.world import World
from launch.cluster.rank_entry import RankEntry
from launch.step_run import StepRun
from tests.helpers.report_streams import write_streams
from tests.helpers.sent_events import queue_of

NUM_STEPS = 3
LAST = NUM_STEPS - 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The configuration of a stream whose steps are committed, and whose jobs keep their events."""
    write_streams(tmp_path, {"finetune": {}})
    found = load_summary(f"{tmp_path}/made-finetune-seed0", LAST).config
    found = found.model_copy(update={"output": str(tmp_path)})
    open_run(found, is_elsewhere=True)
    (tmp_path / "jobs").mkdir()
    return found


def run_job(config: Config, folder: Path, step: int = LAST) -> None:
    """Start the job of a step again."""
    entry = RankEntry(StepRun(config, step, NUM_STEPS, "id"), str(folder), "local")
    assert entry._run(World()) == 0
    assert (folder / f"step_{step:03d}.done").exists()


def test_a_job_publishes_once_what_one_before_it_did_not_wherever_that_was_killed(
    config: Config, tmp_path: Path
) -> None:
    queue, page = queue_of(stream_url(config)), Path(stream_url(config), "report.html")
    run_job(config, tmp_path / "jobs")
    lines = queue.path.read_text().splitlines(keepends=True)
    kinds = [json.loads(line)["kind"] for line in lines]
    ends = [number + 1 for number, kind in enumerate(kinds) if kind in ("artifact", "register", "file")][-3:]
    for kept in (ends[0] - 1, *ends):
        queue.path.write_text("".join(lines[:kept]))
        if not queue.events("file"):
            page.unlink()
        run_job(config, tmp_path / "jobs")
        kinds = [json.loads(line)["kind"] for line in queue.path.read_text().splitlines()]
        published = [kind for kind in kinds if kind in ("artifact", "register", "file")]
        assert published == ["artifact"] * NUM_STEPS + ["register", "file"]
        assert [event["status"] for event in queue.events("end") if event["run"] == STREAM][-1] == "FINISHED"
        assert page.exists()


def test_a_step_that_is_trained_again_is_published_again(config: Config, tmp_path: Path) -> None:
    run_job(config, tmp_path / "jobs")
    commit = Path(stream_url(config), f"step_{LAST:03d}", "COMMITTED.json")
    commit.write_text(commit.read_text().replace('"seconds": 1', '"seconds": 2'))
    run_job(config, tmp_path / "jobs")
    queue = queue_of(stream_url(config))
    assert [event["step"] for event in queue.events("artifact")] == [0, 1, 2, 2]
    assert [event["step"] for event in queue.events("register")] == [2, 2]
    assert len(queue.events("file")) == 2


def test_of_a_step_that_is_not_the_last_one_the_results_alone_are_published(config: Config, tmp_path: Path) -> None:
    queue = queue_of(stream_url(config))
    queue.path.write_text(queue.path.read_text().splitlines(keepends=True)[0])
    run_job(config, tmp_path / "jobs", step=1)
    assert queue.events("artifact")
    assert not queue.events("register") + queue.events("file")
