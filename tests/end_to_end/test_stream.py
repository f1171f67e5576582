"""Whole streams through the command line: bits, resume, behaviour, contents of MLflow and of the report."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from torch.multiprocessing.spawn import start_processes

from avcil_dist.compose import load_config
from avcil_dist.data.manifest import load_manifest
from avcil_dist.streams.summary import is_committed
from avcil_dist.world import World
from launch.local_worlds import local_worlds
from launch.step_run import StepRun
from tests.helpers.sent_events import histories
from tests.helpers.streams import STEPS, avcil, last_artifact, train, weights_digest, write_config
from tests.helpers.tracker_files import tensorboard_values, wandb_values

ROOT = Path(__file__).parents[2]


def test_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    first = train(config, f"output={tmp_path}/first", "-n", 2)
    second = train(config, f"output={tmp_path}/second", "-n", 2)
    other = train(config, f"output={tmp_path}/other", "-n", 2, "seed=1")
    assert weights_digest(second) == weights_digest(first)
    assert weights_digest(other) != weights_digest(first)


def test_a_stream_killed_between_steps_continues_to_the_same_bits(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    whole = train(config, f"output={tmp_path}/whole")
    stream = f"{tmp_path}/killed/tiny-avcil-seed0"
    words = [sys.executable, "-m", "avcil_dist", "train", str(config), f"output={tmp_path}/killed"]
    process = subprocess.Popen(words, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 120
    while not is_committed(stream, 0) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert is_committed(stream, 0)
    assert not is_committed(stream, len(STEPS) - 1)

    assert train(config, f"output={tmp_path}/killed") == stream
    assert weights_digest(stream) == weights_digest(whole)
    assert last_artifact(stream).metrics == last_artifact(whole).metrics


def test_a_finished_stream_is_not_trained_again(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = train(config)
    before = Path(stream, "step_002", "COMMITTED.json").stat().st_mtime_ns
    train(config)
    assert Path(stream, "step_002", "COMMITTED.json").stat().st_mtime_ns == before
    run = StepRun(load_config(str(config), []), 2, len(STEPS), run_id=None)  # as after a wait for another process
    with local_worlds(2) as worlds:
        start_processes(_run_again, (run, worlds), 2, start_method="forkserver")
    assert Path(stream, "step_002", "COMMITTED.json").stat().st_mtime_ns == before
    train(config, "--restart")
    assert Path(stream, "step_002", "COMMITTED.json").stat().st_mtime_ns != before


def _run_again(rank: int, run: StepRun, worlds: tuple[World, ...]) -> None:
    run.run(worlds[rank], report=print)


def test_a_half_written_artifact_does_not_count(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = train(config)
    digest = weights_digest(stream)
    Path(stream, "step_002", "COMMITTED.json").unlink()
    Path(stream, "step_002", "model.safetensors").write_bytes(b"half")
    train(config)
    assert weights_digest(stream) == digest


def test_memory_makes_avcil_forget_less_than_finetuning_and_joint_forgets_least(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    metrics = {
        method: last_artifact(train(config, f"method={method}")).metrics for method in ("finetune", "avcil", "joint")
    }
    forgetting = {method: found.average_forgetting or 0.0 for method, found in metrics.items()}
    assert forgetting["finetune"] > 0.5
    assert forgetting["avcil"] < forgetting["finetune"] - 0.3
    assert forgetting["joint"] < 0.2
    assert metrics["joint"].seen_accuracy[-1] >= metrics["avcil"].seen_accuracy[-1] - 0.05


def test_memory_holds_the_quota_of_each_class_and_only_training_clips(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    artifact = last_artifact(train(config))
    manifest = load_manifest(artifact.config.data.manifest)
    assert list(artifact.memory.keys) == list(artifact.scenario.classes)
    for name, keys in artifact.memory.keys.items():
        assert len(keys) == 30 // 6
        manifest.clip_numbers(name, keys)  # raises for a key that is no training clip of the class


def test_mlflow_holds_a_stream_run_and_a_run_for_each_step_and_other_trackers_their_values(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = train(config, "tracking.trackers=[tensorboard,wandb]")
    artifact = last_artifact(stream)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    [experiment] = [found for found in client.search_experiments() if found.name == "avcil"]
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = {run.data.tags["avcil.step"]: run for run in runs if run.info.run_id != parent.info.run_id}
    assert sorted(children) == ["0", "1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert parent.data.params["optim.lr"] == "0.003"
    seen = client.get_metric_history(parent.info.run_id, "test/seen_accuracy")
    assert [point.value for point in seen] == pytest.approx(artifact.metrics.seen_accuracy)
    child = children["2"]
    epochs = client.get_metric_history(child.info.run_id, "epoch_loss/total")
    per_epoch = epochs[0].step
    assert [point.step for point in epochs] == [per_epoch * number for number in range(1, 13)]  # by iteration
    assert len(client.get_metric_history(child.info.run_id, "loss/total")) >= 12
    of_training = {name.split("/")[0] for name in child.data.metrics} - {"system"}  # there if the step takes 10 s
    assert {"loss", "optim", "speed", "memory", "epoch_loss", "epoch_data", "val", "test", "time"} == of_training
    assert child.data.metrics["optim/gradient_norm"] > 0
    assert child.data.metrics["speed/tflop_per_second"] > 0
    assert "epoch_data/retries" not in child.data.metrics  # always zero
    assert child.data.params["optim.lr"] == "0.003"
    assert {child.data.tags[name] for name in ("step", "seed", "method")} == {"2", "0", artifact.config.method.name}
    assert {item.path for item in client.list_artifacts(child.info.run_id)} >= {"confusion.png", "confusion.json"}
    assert "report.html" in {item.path for item in client.list_artifacts(parent.info.run_id)}
    files = {item.path for item in client.list_artifacts(children["2"].info.run_id, "step_002")}
    assert {"step_002/model.safetensors", "step_002/COMMITTED.json"} <= files

    logged = {name: histories(client, run.info.run_id) for name, run in {"stream": parent, **children}.items()}
    for name, values_in in (("tensorboard", tensorboard_values), ("wandb", wandb_values)):
        found = values_in(Path(stream, name))
        for run, of_run in logged.items():
            assert found[run].keys() == of_run.keys()
            for metric, values in of_run.items():
                assert [position for position, _ in found[run][metric]] == [position for position, _ in values]
                assert [value for _, value in found[run][metric]] == pytest.approx([v for _, v in values], rel=1e-6)


def test_committed_steps_that_were_not_uploaded_are_uploaded_at_the_next_start(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = train(config)
    shutil.rmtree(Path(stream, "events"))  # as after a kill between the commit and its event
    Path(stream, "report.html").unlink()
    elsewhere = f"sqlite:///{tmp_path}/elsewhere.db"  # a tracking database that knows nothing of the stream
    train(config, f"tracking.uri={elsewhere}")
    client = MlflowClient(elsewhere)
    runs = client.search_runs([found.experiment_id for found in client.search_experiments()])
    assert sorted(run.data.tags["avcil.step"] for run in runs if "avcil.step" in run.data.tags) == ["0", "1", "2"]
    [stream_run] = [run for run in runs if "avcil.step" not in run.data.tags]
    assert "report.html" in {file.path for file in client.list_artifacts(stream_run.info.run_id)}
    assert [model.name for model in client.search_registered_models()] == ["tiny-avcil"]


def test_eval_gives_the_committed_accuracy(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = train(config, "-n", 2)
    result = avcil("eval", stream)
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    metrics = last_artifact(stream).metrics
    assert (found["step"], found["num_clips"]) == (2, 60)
    assert found["seen_accuracy"] == pytest.approx(metrics.seen_accuracy[-1])
    assert found["task_accuracy"] == pytest.approx(metrics.accuracy[-1])
    validated = json.loads(avcil("eval", stream, "--split", "val").output)
    assert validated["seen_accuracy"] == pytest.approx(metrics.val_accuracy)


def test_report_shows_all_streams_of_a_folder(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for method in ("finetune", "avcil"):
        train(config, f"method={method}")
    result = avcil("report", tmp_path / "runs", "--page", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert "finetune" in result.output
    assert "avcil" in (tmp_path / "page.html").read_text()


def test_torchrun_gives_the_bits_of_the_builtin_launcher(tmp_path: Path) -> None:
    """As documented, and with a port that a step's ranks could not use: torchrun has the one before it."""
    config = write_config(tmp_path)
    own = train(config, f"output={tmp_path}/own", "-n", 2)
    torchrun, command = (Path(sys.executable).with_name(name) for name in ("torchrun", "avcil"))
    with socket.socket() as other:
        port = port_before(other)
        words = [torchrun, f"--master-port={port}", "--nproc-per-node=2", "--no-python", command, "train", config]
        words += [f"output={tmp_path}/torchrun"]
        subprocess.run([str(word) for word in words], cwd=tmp_path, check=True, timeout=200)
    assert weights_digest(f"{tmp_path}/torchrun/{Path(own).name}") == weights_digest(own)


def port_before(other: socket.socket) -> int:
    """A free port; `other` listens at the next one."""
    for port in range(23000, 24000, 2):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                other.bind(("", port + 1))
            except OSError:
                continue
        other.listen()
        return port
    raise AssertionError("no free port")


def test_an_interrupt_ends_quietly_and_loses_no_committed_step(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    stream = f"{tmp_path}/runs/tiny-avcil-seed0"
    process = subprocess.Popen(
        [sys.executable, "-m", "avcil_dist", "train", str(config), "-n", "2"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not is_committed(stream, 0) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes in the foreground
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "interrupted" in errors
    assert is_committed(stream, 0)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_demo_runs_and_avcil_forgets_clearly_less(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/demo.sh", str(tmp_path / "demo")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    forgetting, evidence = {}, {}
    for method in ("finetune", "avcil"):
        metrics = json.loads((tmp_path / "demo" / f"demo-{method}-seed0" / "step_003" / "metrics.json").read_text())
        forgetting[method] = metrics["average_forgetting"]
        evidence[method] = metrics["regions"]["evidence"]
        assert len(metrics["seen_accuracy"]) == 4
    assert forgetting["avcil"] < forgetting["finetune"] - 0.3
    assert "mlflow ui" in done.stdout
    page = (tmp_path / "demo" / "report.html").read_text()
    assert "Evidence on the sounding region" in page
    assert page.count("<audio") == 2
    assert "<audio" in (tmp_path / "demo" / "attention.html").read_text()
    assert evidence["avcil"][-1][0] > 0.25  # of the first task on its region, whose area is a quarter
    assert evidence["finetune"][-1][0] is None
