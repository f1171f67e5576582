"""Streams side by side, and grids of them."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from avcil_dist.compose import load_config
from avcil_dist.errors import ConfigError
from avcil_dist.reporting.compare import group_by_config, print_comparison, spread
from avcil_dist.reporting.report import StreamReport
from avcil_dist.scenario import Scenario
from avcil_dist.streams.metrics import MemoryUse, StreamMetrics, SubsetMetrics
from launch.sweep import make_grid
from tests.helpers.streams import write_config


def stream(seen: float, *overrides: str, disjoint: float | None = None) -> StreamReport:
    config = load_config("demo", overrides)
    metrics = StreamMetrics(0, ((seen,),), (seen,), {}, 10, 0, None)
    if disjoint is not None:
        metrics = replace(metrics, source_disjoint=SubsetMetrics((disjoint,), 5))
    return StreamReport("runs/x", config, Scenario((("a",),)), metrics)


def printed(streams: list[StreamReport]) -> str:
    text = io.StringIO()
    print_comparison(group_by_config(streams), Console(file=text, width=200))
    return text.getvalue()


def test_seeds_of_one_configuration_are_one_row_with_mean_and_deviation() -> None:
    streams = [stream(0.5, "seed=1"), stream(0.8, "method=joint"), stream(0.7, "seed=2", "output=elsewhere")]
    rows = group_by_config(streams)
    assert [[s.config.seed for s in row.streams] for row in rows] == [[1, 2], [0]]
    text = printed(streams)
    assert "60.0 ± 14.1" in text  # of 50 and 70, as a sample
    assert "1, 2" in text
    assert "80.0" in text


def test_class_orders_of_one_configuration_are_one_row_with_mean_and_deviation() -> None:
    orders = [stream(seen, f"scenario.shuffle_seed={n}", f"name=demo-order{n}") for n, seen in enumerate((0.5, 0.7))]
    [row] = group_by_config([*orders, stream(0.6, "scenario.shuffle_seed=0", "name=demo-order0", "seed=1")])
    assert (row.variant, len(row.streams)) == ("", 3)
    text = printed(list(row.streams))
    assert "60.0 ± 10.0" in text
    assert "class orders" in text
    assert re.search(r"demo\W+avcil\W+0, 1\W+0, 1\W", text)
    assert "class orders" not in printed([stream(0.5)])


def test_variants_of_one_method_are_named_by_the_settings_that_differ() -> None:
    rows = group_by_config(
        [stream(0.5), stream(0.5, "method.attention=false"), stream(0.5, "method=joint", "optim.epochs=3")]
    )
    assert [row.variant for row in rows] == ["attention=true", "attention=false", ""]


@pytest.mark.parametrize("setting", ["engine.precision=bf16", "engine.max_grad_norm=1.0"])
def test_settings_of_the_engine_that_change_the_results_make_another_row(setting: str) -> None:
    rows = group_by_config([stream(0.5, "seed=1"), stream(0.7, setting, "seed=2")])
    assert [[s.config.seed for s in row.streams] for row in rows] == [[1], [2]]
    assert rows[1].variant == setting
    assert len(group_by_config([stream(0.5, "seed=1"), stream(0.7, "engine.zero_stage=2", "seed=2")])) == 1


def test_columns_without_values_are_left_out() -> None:
    assert "source-disjoint" not in printed([stream(0.5)])
    assert "forgetting" not in printed([stream(0.5)])
    assert "25.0" in printed([stream(0.5, disjoint=0.25)])


def test_the_memory_is_beside_the_accuracies() -> None:
    one, two = stream(0.5, "seed=1"), stream(0.7, "seed=2")
    used = replace(one, metrics=replace(one.metrics, memory=MemoryUse(3, 1_200_000, 0, 0)))
    text = printed([used, two])
    assert "memory, MB" in text
    assert "1.2, –" in text


def test_a_single_value_has_no_deviation() -> None:
    assert spread([0.123]) == "12.3"
    assert spread([None, None]) == "–"
    assert spread([0.1, None, 0.3]) == "20.0 ± 14.1"


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
