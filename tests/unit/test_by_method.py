"""Settings that apply to one method each, and the published ones in the shipped benchmarks."""

from pathlib import Path

import pytest

from avcil_dist.compose import load_config
from avcil_dist.errors import ConfigError

BASE = """
extends: base
name: mine
data: {manifest: m.json}
scenario: {classes_per_step: 2}
model: {visual: {kind: precomputed}, audio: {kind: precomputed}}
optim: {epochs: 7, lr: 0.5}
by_method:
  finetune: {optim: {epochs: 3}}
  avcil: {optim: {epochs: 9}, method: {lambda_instance: 0.5}}
"""

# METHODS.md, "Benchmarks": epochs of finetune, joint, lwf, icarl, ssil, afc, avcil.
METHODS = ("finetune", "joint", "lwf", "icarl", "ssil", "afc", "avcil")
EPOCHS = {
    "ave_ci": (150, 150, 200, 150, 200, 150, 200),
    "ks_ci": (150, 100, 100, 100, 100, 100, 200),
    "vs100_ci": (200, 200, 200, 200, 200, 200, 200),
    "vggsound_full": (30, 30, 30, 30, 30, 30, 30),
}
LAMBDA_INSTANCE = {"ave_ci": 0.5, "ks_ci": 0.1, "vs100_ci": 0.1, "vggsound_full": 0.1}
MEMORY = {"ave_ci": 340, "ks_ci": 500, "vs100_ci": 1500, "vggsound_full": 4500}


def write(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(("benchmark", "epochs"), EPOCHS.items())
def test_benchmarks_have_the_published_epochs(benchmark: str, epochs: tuple[int, ...]) -> None:
    found = tuple(load_config(benchmark, [f"method={method}"]).optim.epochs for method in METHODS)
    assert found == epochs


@pytest.mark.parametrize("benchmark", EPOCHS)
def test_benchmarks_have_the_published_settings(benchmark: str) -> None:
    config = load_config(benchmark)
    assert config.method.name == "avcil"
    assert (config.method.model_extra or {})["lambda_instance"] == LAMBDA_INSTANCE[benchmark]
    assert config.memory.size == MEMORY[benchmark]
    assert (
        config.optim.lr,
        config.optim.weight_decay,
        config.optim.global_batch,
        config.optim.global_replay_batch,
    ) == (
        1e-3,
        1e-4,
        256,
        128,
    )
    assert config.data.source_disjoint == (benchmark in ("vs100_ci", "vggsound_full"))


def test_the_chosen_method_has_its_settings_and_the_others_theirs(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", BASE)
    assert load_config(path).optim.epochs == 9
    assert load_config(path, ["method=finetune"]).optim.epochs == 3
    assert load_config(path, ["method=joint"]).optim.epochs == 7
    assert load_config(path).optim.lr == 0.5


def test_the_command_line_has_the_last_word_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, "mine.yaml", BASE)
    for words in (["optim.epochs=2", "method=finetune"], ["method=finetune", "optim.epochs=2"]):
        assert load_config(path, words).optim.epochs == 2
    extra = load_config(path, ["method.lambda_instance=0.25", "method=avcil"]).method.model_extra
    assert extra is not None
    assert extra["lambda_instance"] == 0.25


def test_a_file_that_extends_has_the_last_word(tmp_path: Path) -> None:
    write(tmp_path, "mine.yaml", BASE)
    other = write(tmp_path, "other.yaml", "extends: mine.yaml\noptim: {epochs: 1}\n")
    assert load_config(other).optim.epochs == 1
    assert (load_config(other).method.model_extra or {})["lambda_instance"] == 0.5
    named = write(tmp_path, "named.yaml", "extends: mine.yaml\nmethod: avcil\n")
    assert (load_config(named).method.model_extra or {})["lambda_instance"] == 0.5
    own = write(tmp_path, "own.yaml", "extends: mine.yaml\nby_method: {avcil: {optim: {epochs: 4}}}\n")
    assert load_config(own).optim.epochs == 4
    assert load_config(own, ["method=finetune"]).optim.epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("by_method: {avcli: {optim: {epochs: 1}}}", "by_method: method.name: 'avcli' is none of"),
        ("by_method: [avcil]", "by_method: a mapping of methods to settings"),
        ("by_method: {avcil: 3}", "by_method: a mapping of methods to settings"),
        ("by_method: {avcil: {optim: {epoch: 1}}}", "mine.yaml (by_method.avcil): optim.epoch: unknown key"),
        ("by_method: {avcil: {optim: {epochs: 0}}}", "mine.yaml (by_method.avcil): optim.epochs: 0: "),
    ],
)
def test_wrong_settings_by_method_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "mine.yaml", BASE[: BASE.index("by_method")] + text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)
