"""Grids of streams, and the values of their settings on the command line."""

import re
from pathlib import Path

import pytest

from avcil_dist.compose import load_config
from avcil_dist.config.variant_names import benchmark_name
from avcil_dist.errors import ConfigError
from launch.cluster.chain_record import read_chain
from launch.reproduce import reproduction_grid
from launch.sweep import make_grid, num_points, split_values
from tests.helpers.fake_slurm import FakeSlurm
from tests.helpers.streams import STEPS, avcil, write_config


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("1,2,3", ["1", "2", "3"]),
        ("[3,2],[1,1,3]", ["[3,2]", "[1,1,3]"]),
        ("[[1,2],[3]],4", ["[[1,2],[3]]", "4"]),
        ("{a: 1, b: [2, 3]},none", ["{a: 1, b: [2, 3]}", "none"]),
        ("s3://bucket/x-{0..9}.tar", ["s3://bucket/x-{0..9}.tar"]),
    ],
)
def test_commas_separate_values_except_within_brackets(text: str, values: list[str]) -> None:
    assert split_values(f"section.key={text}") == [f"section.key={value}" for value in values]


@pytest.mark.parametrize("word", ["seed", "name="])
def test_a_word_without_values_is_left_to_the_configuration(word: str) -> None:
    assert split_values(word) == [word]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[3,2", r"'\]' is missing"),
        ("a[b", r"'\]' is missing"),
        ("3,2]", r"'\]' without its opening bracket"),
        ("[3,{a: 1]}", r"'\]' without its opening bracket"),
        ("1,,2", "empty value"),
        ("1,", "empty value"),
        (",1", "empty value"),
    ],
)
def test_a_value_that_is_cut_short_is_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=rf"command line: scenario.classes_per_step=.*: .*{problem}"):
        split_values(f"scenario.classes_per_step={text}")


def test_the_number_of_streams_is_that_of_all_combinations() -> None:
    assert num_points(["seed=1,2,3", "method=a,b", "name=x"], ablation=False) == 6
    assert num_points(["seed=1,2"], ablation=True, class_orders=5) == 80
    assert num_points([], ablation=False) == 1


def test_a_grid_is_every_combination_with_a_stream_of_its_own(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    points = make_grid(config, ["method=finetune,ssil", "seed=1,2", "optim.lr=0.1,0.2"], ablation=False, processes=1)
    names = [point.config.stream_name for point in points]
    assert len(set(names)) == 8
    assert names[0] == "tiny-lr-0_1-finetune-seed1"
    assert {point.config.optim.lr for point in points} == {0.1, 0.2}


def test_commas_in_brackets_do_not_part_values(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    [point] = make_grid(config, ["scenario.classes_per_step=[2,4]", "method=lwf"], ablation=False, processes=1)
    assert point.config.scenario.classes_per_step == [2, 4]
    assert point.config.stream_name == "tiny-lwf-seed0"
    points = make_grid(config, ["scenario.classes_per_step=[2,4],[1,5]"], ablation=False, processes=1)
    assert [point.config.scenario.classes_per_step for point in points] == [[2, 4], [1, 5]]


def test_an_ablation_is_every_combination_of_avcils_parts(tmp_path: Path) -> None:
    points = make_grid(str(write_config(tmp_path)), [], ablation=True, processes=1)
    options = [point.config.method.model_extra or {} for point in points]
    parts = ("instance", "class_aware", "attention")
    assert len({tuple(option[part] for part in parts) for option in options}) == 8
    names = {point.config.stream_name for point in points}
    assert len(names) == 8
    assert {"tiny-avcil-seed0", "tiny-no_instance-no_class_aware-no_attention-avcil-seed0"} <= names


def test_class_orders_are_streams_of_their_own_seeded_from_0(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    points = make_grid(path, ["method=finetune", "seed=3,4"], ablation=False, processes=1, class_orders=2)
    found = [(point.config.stream_name, point.config.scenario.shuffle_seed) for point in points]
    assert found == [
        ("tiny-order0-finetune-seed3", 0),
        ("tiny-order1-finetune-seed3", 1),
        ("tiny-order0-finetune-seed4", 0),
        ("tiny-order1-finetune-seed4", 1),
    ]
    with pytest.raises(ConfigError, match=r"^--class-orders: it varies scenario.shuffle_seed, which is set too"):
        make_grid(path, ["scenario.shuffle_seed=7"], ablation=False, processes=1, class_orders=2)
    [alone] = make_grid(path, ["method=finetune"], ablation=False, processes=1)
    assert (alone.config.name, alone.config.scenario.shuffle_seed) == ("tiny", None)


def test_an_ablation_of_another_method_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--ablation: .* the method is ssil; set method=avcil"):
        make_grid(str(write_config(tmp_path)), ["method=ssil"], ablation=True, processes=1)


def test_a_grid_with_an_impossible_point_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.global_batch=5000"):
        make_grid(str(write_config(tmp_path)), ["optim.global_batch=12,5000"], ablation=False, processes=1)
    assert not (tmp_path / "runs").exists()


def test_a_reproduction_has_every_method_on_every_modality_and_the_ablation(tmp_path: Path) -> None:
    points = reproduction_grid(str(write_config(tmp_path)), [], seeds=2, processes=1)
    names = [point.config.stream_name for point in points]
    assert len(names) == len(set(names)) == 2 * 32
    rows = {
        (c.method.name, c.model.modality, (c.method.model_extra or {}).get("predict"))
        for c in (point.config for point in points)
    }
    both = {("finetune", None), ("lwf", None), ("ssil", None), ("joint", None)}
    both |= {("icarl", "nme"), ("icarl", "fc"), ("afc", "nme"), ("afc", "lsc")}
    wanted = {(method, m, p) for method, p in both for m in ("both", "audio", "visual")} | {("avcil", "both", None)}
    assert rows == wanted
    parts = ("instance", "class_aware", "attention")
    found = {
        tuple((c.method.model_extra or {})[part] for part in parts)
        for c in (point.config for point in points)
        if c.method.name == "avcil"
    }
    assert len(found) == 8
    assert "tiny-finetune-seed0" in names  # the name that `avcil train` gives it: not trained twice
    listed = avcil("reproduce", tmp_path / "tiny.yaml", "--seeds", 2, "--dry-run", "data.manifest=nowhere.json")
    assert listed.exit_code == 0, listed.output
    assert [line.split()[0] for line in listed.stdout.splitlines()] == names


def test_streams_of_a_sweep_are_of_the_benchmark_that_it_varies(tmp_path: Path) -> None:
    points = reproduction_grid(str(write_config(tmp_path)), [], seeds=1, processes=1, checked=False)
    assert {benchmark_name(point.config) for point in points} == {"tiny"}
    words = ["optim.lr=0.1,0.2", "method.attention=true,false", "seed=1,2"]
    points = make_grid(str(write_config(tmp_path)), words, ablation=False, processes=1, class_orders=2)
    assert {benchmark_name(point.config) for point in points} == {"tiny"}
    assert benchmark_name(load_config("demo", ["name=epochs-10"])) == "epochs-10"
    assert benchmark_name(load_config("demo", ["name=my-epochs-99"])) == "my-epochs-99"


@pytest.mark.slow
def test_a_sweep_submitted_again_waits_for_all_chains_that_its_lane_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm = FakeSlurm(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{slurm.folder}:/usr/bin:/bin")
    streams = [str(tmp_path / "runs" / f"tiny-finetune-seed{seed}") for seed in (1, 2, 3)]
    words = ("method=finetune", "seed=1,2,3", "--cluster", "slurm", "cluster.max_parallel=1")

    def submit() -> list[list[str]]:
        """Submit the sweep. Returns for each stream with new jobs the ids of other chains that its first job awaits."""
        before = len(slurm.calls("sbatch"))
        result = avcil("sweep", write_config(tmp_path), *words)
        assert result.exit_code == 0, result.output
        texts = [Path(arguments[1]).read_text() for arguments, _ in slurm.calls("sbatch")[before :: len(STEPS)]]
        return [re.findall(r"\d+", "".join(re.findall(r"--dependency=afterany:(.*)", text))) for text in texts]

    def last_job(stream: str) -> str:
        return read_chain(stream).jobs[len(STEPS) - 1][-1]

    assert submit() == [[], [last_job(streams[0])], [last_job(streams[1])]]
    rows = [  # the first chain has ended
        f"{ids[-1]}|PENDING|||||0|None|{next(read_chain(stream).log_folder(step).glob('*.sh'))}|\n"
        for stream in streams[1:]
        for step, ids in read_chain(stream).jobs.items()
    ]
    slurm.answer("squeue", "".join(rows))
    assert submit() == [[last_job(streams[1]), last_job(streams[2])]]
