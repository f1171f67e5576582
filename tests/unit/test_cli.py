"""The `avcil` command: its start, and its output under a launcher."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from avcil_dist.streams.artifact import save_artifact
from launch.cli.main import cli
from tests.helpers.artifacts import make_artifact
from tests.helpers.streams import avcil, write_config

HEAVY = ("torch", "deepspeed", "mlflow", "submitit", "pydantic", "jinja2", "yaml", "numpy")
RANK_1 = {
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.slow
def test_help_imports_none_of_the_large_libraries() -> None:
    code = f"import sys, launch.cli.main; print(sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (
            ("train", "demo", "--epochs", "3"),
            "No such option '--epochs'. It is a setting, without dashes: optim.epochs=",
        ),
        (("sweep", "demo", "--method=er"), "It is a setting, without dashes: method=VALUE"),
        (("train", "demo", "--size", "3"), "No such option '--size'. (Did"),  # several settings
        (("eval", "x", "--epochs", "3"), "No such option '--epochs'.\n"),  # no settings
        (("train", "demo", "--proceses", "3"), "Did you mean '--processes'?"),
    ],
)
def test_a_setting_that_is_given_as_an_option_is_named(words: tuple[str, ...], answer: str) -> None:
    refused = avcil(*words)
    assert refused.exit_code == 2
    assert answer in refused.output


@pytest.mark.slow
@pytest.mark.parametrize("command", ["status", "logs", "cancel", "report", "compare", "config show demo"])
def test_looking_at_a_stream_imports_no_training(command: str, tmp_path: Path) -> None:
    save_artifact(str(tmp_path / "stream"), make_artifact())
    code = (
        "import sys\nfrom launch.cli.main import cli\ntry:\n    cli()\nexcept SystemExit:\n    "
        'print(sorted({"torch", "mlflow", "matplotlib"} & set(sys.modules)), file=sys.stderr)'
    )
    words = [sys.executable, "-c", code, *command.split()]
    words += [] if command.startswith("config") else [str(tmp_path / "stream")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]", done.stderr


def test_every_command_has_a_help_text() -> None:
    def check(name: str, command: object) -> None:
        result = CliRunner().invoke(cli, [*name.split(), "--help"])
        assert result.exit_code == 0, result.output
        assert getattr(command, "help", None), name
        for child, inner in getattr(command, "commands", {}).items():
            check(f"{name} {child}".strip(), inner)

    check("", cli)


@pytest.fixture(params=[0, 1])
def rank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The rank of this process under torchrun."""
    for name, value in (RANK_1 | {"RANK": str(request.param), "LOCAL_RANK": str(request.param)}).items():
        monkeypatch.setenv(name, value)
    return int(request.param)


def returning(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


def test_only_the_main_rank_prints_the_results_of_eval(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.evaluation.evaluate_stream", returning({"seen_accuracy": 0.5}))
    result = avcil("eval", "runs/stream")
    assert result.exit_code == 0, result.output
    assert result.output == ("" if rank else json.dumps({"seen_accuracy": 0.5}, indent=1) + "\n")


def test_only_the_main_rank_prints_the_end_of_train(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.local.run_stream", returning("runs/stream"))
    result = avcil("train", "demo")
    assert result.exit_code == 0, result.output
    assert result.output.count("all steps are committed") == 1 - rank


def test_only_the_main_rank_prints_the_comparison_of_a_sweep(
    rank: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("launch.sweep_runs.run_stream", returning("runs/stream"))
    monkeypatch.setattr("avcil_dist.reporting.report.load_streams", returning([]))
    result = avcil("sweep", write_config(tmp_path), "seed=1,2")
    assert result.exit_code == 0, result.output
    assert bool(result.output) == (rank == 0)
