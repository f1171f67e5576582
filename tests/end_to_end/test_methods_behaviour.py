"""What the methods are for, on synthetic features: who forgets, and who does not."""

import json
from pathlib import Path

import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.reporting.evaluation_tables import evaluation_tables
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from data_shards.random_features import make_feature_shards
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import avcil, run_streams, write_config

REPLAY = ("er", "derpp", "wa", "bic", "memo", "foster", "anchored")
SUMS = ("analytic", "kernel", "ncm", "slda", "ranpac", "acil", "air")  # without training
METHODS = ("finetune", "joint", "lwf", "ssil", "avcil", "icarl", "afc", *REPLAY, *SUMS)
STEPS = [1, 2, 3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepArtifact]:
    """The last step of each method on six classes that overlap a little."""
    folder = tmp_path_factory.mktemp("behaviour")
    clips = {"train": 24, "val": 6, "test": 20}
    make_feature_shards(folder / "shards", classes=6, clips=clips, separation=1.0)
    path = write_config(folder, scenario={"classes_per_step": STEPS})
    [streams] = run_ranks(run_streams, 1, [configured(str(path), method) for method in METHODS])
    return {method: load_artifact(stream, 2) for method, stream in zip(METHODS, streams, strict=True)}


def configured(path: str, method: str) -> Config:
    """The method, with a random expansion that suits the size of the data."""
    expansion = ["method.expansion=64"] if method in ("ranpac", "acil", "air") else []
    return load_config(path, [f"method={method}", *expansion])


def forgetting(artifact: StepArtifact) -> float:
    assert artifact.metrics.average_forgetting is not None
    return artifact.metrics.average_forgetting


def test_finetuning_forgets_most_of_what_it_knew(results: dict[str, StepArtifact]) -> None:
    assert forgetting(results["finetune"]) > 0.5
    accuracy = results["finetune"].metrics.accuracy
    assert accuracy[2][1] < 0.5 * accuracy[1][1]


@pytest.mark.parametrize("method", ["avcil", "ssil", "icarl", "afc", *REPLAY])
def test_methods_with_memory_forget_less_by_a_wide_margin(results: dict[str, StepArtifact], method: str) -> None:
    assert forgetting(results[method]) < forgetting(results["finetune"]) - 0.3


def test_joint_training_is_the_best_or_near_it(results: dict[str, StepArtifact]) -> None:
    final = {method: artifact.metrics.seen_accuracy[-1] for method, artifact in results.items()}
    assert final["joint"] >= max(final.values()) - 0.1
    assert final["joint"] > final["finetune"] + 0.2


@pytest.mark.parametrize("method", SUMS)
def test_heads_from_sums_keep_up_without_exemplars(results: dict[str, StepArtifact], method: str) -> None:
    assert results[method].memory.count == 0
    assert results[method].metrics.seen_accuracy[-1] >= results["joint"].metrics.seen_accuracy[-1] - 0.1


@pytest.mark.parametrize("method", ["icarl", "analytic"])
def test_classes_outside_the_scenario_are_never_met(tmp_path: Path, method: str) -> None:
    path = write_config(
        tmp_path, scenario={"classes_per_step": [2, 1], "classes": ["class_004", "class_000", "class_002"]}
    )
    gone = sorted((tmp_path / "shards").rglob("*class_001*"))
    assert gone
    for shard in gone:
        shard.unlink()
    config = load_config(str(path), [f"method={method}", "optim.epochs=1"])
    [[stream]] = run_ranks(run_streams, 1, [config], range(2))
    metrics = load_artifact(stream, 1).metrics
    assert metrics.num_test_clips == 30
    assert set(metrics.per_class) == {"class_004", "class_000", "class_002"}


@pytest.mark.parametrize("method", ["ssil", "icarl", "afc", "analytic"])
def test_a_class_of_one_clip_and_a_memory_larger_than_the_data(tmp_path: Path, method: str) -> None:
    make_feature_shards(tmp_path / "shards", classes=6, clips={"train": 1, "val": 1, "test": 1})
    optim = {"epochs": 1, "global_batch": 2, "global_replay_batch": 4, "global_eval_batch": 4}
    path = write_config(tmp_path, scenario={"classes_per_step": [2, 4]}, optim=optim, memory={"size": 500})
    [[stream]] = run_ranks(run_streams, 1, [load_config(str(path), [f"method={method}"])], range(2))
    artifact = load_artifact(stream, 1)
    assert artifact.metrics.num_test_clips == 6
    if method != "analytic":
        assert {len(keys) for keys in artifact.memory.keys.values()} == {1}


def test_a_sweep_trains_the_grid_and_compares_it(tmp_path: Path) -> None:
    path = write_config(tmp_path, scenario={"classes_per_step": [4, 2]})
    words = ["sweep", path, "method=analytic", "seed=1,2"]
    result = avcil(*words)
    assert result.exit_code == 0, result.output
    assert "2/2  tiny-analytic-seed2" in result.output
    assert "1, 2" in result.output
    assert "±" in result.output
    compared = avcil("compare", tmp_path / "runs")
    assert compared.exit_code == 0
    assert "±" in compared.output
    smoke = avcil("sweep", path, "method=analytic,ncm", "--smoke", "--parallel", 2)
    assert smoke.exit_code == 0, smoke.output
    assert "all steps work" in smoke.output
    assert {path.name for path in (tmp_path / "runs" / "smoke").glob("*-seed0")} == {
        "tiny-analytic-seed0",
        "tiny-ncm-seed0",
    }


def test_eval_of_a_method_with_means_gives_the_committed_accuracy(results: dict[str, StepArtifact]) -> None:
    for method in ("icarl", "afc", "analytic"):
        artifact = results[method]
        stream = f"{artifact.config.output}/{artifact.config.stream_name}"
        found = avcil("eval", stream)
        assert f'"seen_accuracy": {artifact.metrics.seen_accuracy[-1]}' in found.output


def test_eval_without_a_modality_predicts_from_the_other_one(results: dict[str, StepArtifact]) -> None:
    config = results["analytic"].config
    for kept in ("audio", "visual"):
        found = json.loads(avcil("eval", f"{config.output}/{config.stream_name}", "--modality", kept).output)
        assert found["modality"] == kept
        assert 0.5 < found["seen_accuracy"] <= results["analytic"].metrics.seen_accuracy[-1]


@pytest.mark.parametrize("method", ["avcil", "joint", "finetune", "analytic", "ncm"])
def test_the_memory_counts_the_bytes_of_clips_model_and_state(results: dict[str, StepArtifact], method: str) -> None:
    artifact = results[method]
    memory = artifact.metrics.memory
    assert memory is not None
    clip = 2 * 128 + 2 * (2 * 3 + 1) * 16  # two headers of npy, and float16 of (2 · 3) tokens and a sound of 16
    num_clips = {"avcil": 30, "joint": 6 * 24}.get(method, 0)
    assert (memory.num_clips, memory.clip_bytes) == (num_clips, num_clips * clip)
    assert memory.model_bytes == sum(weight.nbytes for weight in artifact.model.values())
    columns = {"analytic": 49 + 6 + 6 + 1, "ncm": 6 + 6}.get(method, 0)  # G, H, W and the ridge
    assert memory.state_bytes == 8 * 49 * columns


def test_eval_of_all_steps_gives_the_committed_matrix_and_the_conditions_are_worse(
    results: dict[str, StepArtifact],
) -> None:
    artifact = results["finetune"]
    stream = f"{artifact.config.output}/{artifact.config.stream_name}"
    found = avcil("eval", stream, "--all-steps", "--transfer", "--robustness")
    assert found.exit_code == 0, found.output
    evaluated = json.loads(found.stdout)
    assert evaluated["all_steps"]["accuracy"] == [list(row) for row in artifact.metrics.accuracy]
    assert evaluated["all_steps"]["backward_transfer"] == artifact.metrics.backward_transfer
    assert artifact.metrics.scores is not None
    assert evaluated["task_il_accuracy"] == pytest.approx(artifact.metrics.scores.task_il_accuracy)
    low, high = evaluated["intervals"]["seen_accuracy"]
    assert low < evaluated["seen_accuracy"] < high
    conditions = evaluated["robustness"]
    assert [condition["modality"] for condition in conditions] == ["audio", "visual", *["both"] * 6]
    assert all(condition["seen_accuracy"] <= evaluated["seen_accuracy"] + 0.1 for condition in conditions)
    assert len(evaluated["forward_transfer"]["by_step"]) == 2
    shown = evaluation_tables(evaluated)
    assert [str(cell) for cell in shown[0].columns[0].cells][:4] == [
        "both",
        "sound alone",
        "pictures alone",
        "sound at 20 dB",
    ]
    assert "BWT" in str(shown[1].title)
    assert [len(table.rows) for table in shown] == [1 + len(conditions), 3]
    assert "task 0" in avcil("eval", stream, "--format", "table", "--bootstrap", 0).stdout
    of_fixed_features = avcil("eval", f"{artifact.config.output}/tiny-ncm-seed0", "--transfer")
    assert json.loads(of_fixed_features.stdout)["forward_transfer"] == {"by_step": [None, None], "mean": None}


def test_two_streams_are_compared_clip_by_clip(results: dict[str, StepArtifact]) -> None:
    output = results["joint"].config.output
    result = avcil("compare", f"{output}/tiny-joint-seed0", f"{output}/tiny-finetune-seed0", "--paired")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    joint, finetune = (results[method].metrics.seen_accuracy[-1] for method in ("joint", "finetune"))
    assert found["difference"] == pytest.approx(joint - finetune)
    assert found["only_first"] - found["only_second"] == round(found["difference"] * found["num_clips"])
    assert found["interval"][0] > 0
    assert found["mcnemar_p"] < 0.01
    alone = avcil("compare", f"{output}/tiny-joint-seed0", "--paired")
    assert alone.exit_code == 2


def test_a_reproduction_skips_what_is_trained_and_ends_with_tables_and_a_page(
    results: dict[str, StepArtifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = results["finetune"].config
    # of the tables' grids, those that are trained here under the names that a reproduction gives them
    monkeypatch.setattr("launch.reproduce.TABLES", ((("method=finetune,lwf,ssil,avcil,joint",), False),))
    result = avcil("reproduce", f"{config.output}/../tiny.yaml", "--seeds", 1)
    assert result.exit_code == 0, result.output
    assert "5/5  tiny-joint-seed0" in result.output
    assert "p against" in result.output
    assert "published" in result.output
    page = Path(config.output, "tiny-tables.html")
    assert all(method in page.read_text() for method in ("finetune", "lwf", "ssil", "avcil", "joint"))
