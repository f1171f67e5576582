"""Streams side by side."""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.stats import t as student_t

from avcil_dist.compose import load_config
from avcil_dist.config.loader import SEARCH_PATH
from avcil_dist.errors import ConfigError
from avcil_dist.reporting.compare import compared, group_by_config, spread
from avcil_dist.reporting.formats import TextFormat, formatted, print_table
from avcil_dist.reporting.latex import DEFAULT_METRICS, latex_table
from avcil_dist.reporting.published import Paper, Published, Result, load_published
from avcil_dist.reporting.report import StreamReport
from avcil_dist.reporting.significance import paired_test
from avcil_dist.scenario import Scenario
from avcil_dist.streams.metrics import EpochChoice, MemoryUse, StreamMetrics, SubsetMetrics
from tests.helpers.streams import avcil


def stream(seen: float, *overrides: str, disjoint: float | None = None) -> StreamReport:
    config = load_config("demo", overrides)
    metrics = StreamMetrics(0, ((seen,),), (seen,), {}, 10, 0, None)
    if disjoint is not None:
        metrics = replace(metrics, source_disjoint=SubsetMetrics((disjoint,), 5))
    return StreamReport("runs/x", config, Scenario((("a",),)), metrics, "data")


def printed(streams: list[StreamReport], width: int = 200, **options: Any) -> str:
    text = io.StringIO()
    print_table(compared(group_by_config(streams), **options), Console(file=text, width=width))
    return text.getvalue()


def as_format(kind: TextFormat, streams: list[StreamReport], **options: Any) -> str:
    return formatted(compared(group_by_config(streams), **options), kind)


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


STREAMS = [stream(0.5, "seed=1"), stream(0.7, "seed=2"), stream(0.8, "method=joint", "name=a_b")]


def test_numbers_of_csv_and_json_are_fractions_with_their_count() -> None:
    first = next(csv.DictReader(io.StringIO(as_format("csv", STREAMS))))
    assert (float(first["mean accuracy"]), first["mean accuracy count"]) == (pytest.approx(0.6), "2")
    assert float(first["mean accuracy deviation"]) == pytest.approx(0.1414, abs=1e-4)
    rows = json.loads(as_format("json", STREAMS))["rows"]
    assert rows[0]["mean accuracy"] == {"mean": pytest.approx(0.6), "deviation": pytest.approx(0.02**0.5), "count": 2}
    assert rows[1]["mean accuracy"]["deviation"] is None


def as_latex(streams: list[StreamReport], metrics: Sequence[str] = DEFAULT_METRICS, **options: Any) -> list[str]:
    return latex_table(group_by_config(streams), metrics, **options).splitlines()


def test_the_latex_table_is_that_of_a_paper() -> None:
    def two(method: str, name: str, *accuracies: float) -> list[StreamReport]:
        words = ("scenario.classes_per_step=7", "memory.size=340", f"method={method}", f"name={name}")
        return [stream(value, *words, f"seed={seed}") for seed, value in enumerate(accuracies)]

    streams = [
        *two("finetune", "ave_ci", 0.5, 0.7),
        *two("lwf", "ave_ci", 0.6, 0.6),  # the same mean as it is shown: both are in bold
        *two("joint", "ave_ci", 0.9, 0.9),
        *two("finetune", "b_2", 0.25),
    ]
    of_steps = stream(0.99, "method=ssil", "name=ave_ci", "scenario.classes_per_step=7")
    unfinished = replace(of_steps, scenario=Scenario((("a",), ("b",))))
    lines = as_latex([*streams, unfinished], ["mean"])
    assert lines[0].endswith("over 1 to 2 streams a row; *: steps are missing, never in bold")
    assert lines[1:] == [
        r"\begin{tabular}{lcc}",
        r"\toprule",
        r" & \multicolumn{1}{c}{ave\_ci} & \multicolumn{1}{c}{b\_2} \\",
        r"\cmidrule(lr){2-2} \cmidrule(lr){3-3}",
        r"Method & Mean acc. $\uparrow$ & Mean acc. $\uparrow$ \\",
        r"\midrule",
        r"finetune & \textbf{60.0} $\pm$ 14.1 & 25.0 \\",
        r"lwf & \textbf{60.0} $\pm$ 0.0 & -- \\",
        r"ssil & 99.0$^{*}$ & -- \\",
        r"\midrule",
        r"joint & 90.0 $\pm$ 0.0 & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    published = Published(
        papers={"x": PAPER}, results=(Result(paper="x", benchmark="ave_ci", metric="mean_accuracy", value=70.5),)
    )
    with_paper = as_latex(streams, ["mean", "forgetting"], published=published)
    assert r"X, published & 70.50 & -- & -- & -- \\" in with_paper
    assert "% X: X: a paper. https://example.org/x" in with_paper


def test_a_variant_is_that_among_the_streams_of_its_benchmark() -> None:
    rows = group_by_config([stream(0.5), stream(0.5, "name=other", "optim.epochs=3"), stream(0.5, "optim.epochs=4")])
    assert [row.variant for row in rows] == ["optim.epochs=10", "", "optim.epochs=4"]


def test_the_metrics_of_a_comparison_are_chosen_by_name(tmp_path: Path) -> None:
    table = compared(group_by_config([stream(0.5)]), ["final", "top5", "mean"])
    assert [heading for heading in table.headings if "accuracy" in heading] == ["final\naccuracy", "mean\naccuracy"]
    refused = avcil("compare", tmp_path, "--metrics", "mean,foo")
    assert refused.exit_code == 2
    assert "--metrics: 'foo' is none of mean, final," in refused.stderr
    refused = avcil("compare", tmp_path, tmp_path, "--paired", "--format", "latex", "--metrics", "mean")
    assert "--paired: it compares clips, as JSON; leave out --format latex, --metrics" in refused.stderr


def test_words_are_escaped_in_markdown() -> None:
    assert r"| a\_b | joint |" in as_format("md", STREAMS)
    assert "60.0 ± 14.1" in as_format("md", STREAMS)


def test_a_narrow_terminal_shows_every_column() -> None:
    text = printed([*seeds("ssil", 0.8, 0.9, 0.8), *seeds("avcil", 0.7, 0.6, 0.5)], width=80, significance=True)
    table = [line for line in text.splitlines() if not line.startswith("p:")]  # a note is wrapped by the terminal
    assert max(map(len, table)) <= 80
    assert "…" not in text
    assert all(word in text for word in ("benchmark", "seeds", "memory", "against", "best"))


def seeds(method: str, *accuracies: float) -> list[StreamReport]:
    return [stream(value, f"method={method}", f"seed={seed}") for seed, value in enumerate(accuracies)]


def test_significance_is_the_paired_t_test_against_the_best_corrected_by_holm() -> None:
    best, second, third = (0.8, 0.7, 0.9, 0.8), (0.7, 0.65, 0.8, 0.72), (0.5, 0.45, 0.7, 0.4)
    rows = json.loads(
        as_format(
            "json",
            [
                *seeds("joint", 0.9, 0.8, 0.99, 0.9),
                *seeds("ssil", *best),
                *seeds("avcil", *second),
                *seeds("lwf", *third),
            ],
            significance=True,
        )
    )["rows"]

    def p(values: tuple[float, ...]) -> float:
        differences = np.subtract(values, best)
        t = differences.mean() / (differences.std(ddof=1) / len(differences) ** 0.5)
        return float(2 * student_t.sf(abs(t), df=len(differences) - 1))

    smaller, larger = sorted([p(second), p(third)])
    shown = {row["method"]: row["p against the best"] for row in rows}
    assert (shown["joint"], shown["ssil"]) == ("–", "best")
    assert sorted([shown["avcil"], shown["lwf"]]) == [f"{2 * smaller:.3f}", f"{max(larger, 2 * smaller):.3f}"]


def test_the_best_row_of_a_paper_is_in_bold_and_is_that_of_the_p_and_joint_is_not() -> None:
    unfinished = [replace(one, scenario=Scenario((("a",), ("b",)))) for one in seeds("afc", 0.95, 0.96, 0.97)]
    streams = [*seeds("joint", 0.9, 0.99, 0.8), *seeds("ssil", 0.8, 0.9, 0.7), *seeds("lwf", 0.7, 0.75, 0.65)]
    shown = as_latex([*streams, *unfinished], ["mean"], significance=True)
    assert [line for line in shown if line.startswith(("ssil", "joint", "afc", "Method"))] == [
        r"Method & Mean acc. $\uparrow$ & $p$ \\",
        r"ssil & \textbf{80.0} $\pm$ 10.0 & best \\",
        r"afc & 96.0 $\pm$ 1.0$^{*}$ & -- (0 seeds) \\",
        r"joint & 89.7 $\pm$ 9.5 & -- \\",
    ]
    assert any("joint, the upper bound, is not compared" in line for line in shown)
    assert "no p: no benchmark has two rows with all steps beside joint" in printed(streams[:6], significance=True)


def other_data(streams: list[StreamReport], *classes: str) -> list[StreamReport]:
    return [replace(one, manifest_hash="0123456789", scenario=Scenario((classes or ("a",),))) for one in streams]


def test_streams_of_other_data_are_of_another_benchmark() -> None:
    streams = [*seeds("ssil", 0.8, 0.9, 0.8), *other_data(seeds("lwf", 0.5, 0.6, 0.4))]
    text = printed([*streams, *seeds("er", 0.7, 0.6, 0.65)], significance=True)
    assert [row.benchmark for row in group_by_config(streams)] == [f"demo (manifest hash={h})" for h in DATA]
    assert "demo: streams that differ in manifest hash are not compared with one another" in text
    assert re.search(r"lwf .* – │$", text, re.MULTILINE)
    latex = "\n".join(as_latex(streams, ["mean"], significance=True))
    assert "textbf" not in latex
    assert "no p: no benchmark has two rows with all steps beside joint" in latex
    merged = [stream(0.5, "seed=1"), *other_data([stream(0.5, "seed=2")], "b", "c")]  # one row for two sets of classes
    assert [row.benchmark for row in group_by_config(merged)] == [f"demo (manifest hash={h})" for h in DATA]


DATA = ("data", "01234567")


@pytest.mark.parametrize(
    ("setting", "first"),
    [("scenario.classes_per_step=[1,3]", "2"), ("scenario.imbalance=10.5", "null"), ("data.limit.test=3", "null")],
)
def test_streams_of_another_task_are_of_another_benchmark(setting: str, first: str) -> None:
    rows = group_by_config(
        [stream(0.5), stream(0.7, setting), stream(0.7, setting, "method=er"), stream(0.6, "seed=1")]
    )
    key, _, value = setting.partition(".")[2].partition("=")
    named = [f"demo ({key}={first})", f"demo ({key}={value.replace(',', ', ')})"]
    assert [(row.benchmark, row.variant) for row in rows] == [(named[0], ""), (named[1], ""), (named[1], "")]
    same = [stream(0.5), stream(0.6, "model.modality=audio"), stream(0.6, "scenario.shuffle_seed=1")]
    assert {row.benchmark for row in group_by_config(same)} == {"demo"}


def test_benchmarks_whose_settings_read_the_same_are_numbered() -> None:
    def listed(*last: str) -> StreamReport:
        return stream(0.5, f"scenario.classes=[a_long_name_of_a_class,{','.join(last)}]")

    found = [row.benchmark for row in group_by_config([listed("a", "b"), listed("b", "a")])]
    assert [name.partition("=")[0] for name in found] == ["demo (1: classes", "demo (2: classes"]


def test_data_of_each_seed_are_one_benchmark_and_pair_by_data() -> None:
    def by_seed(method: str, *accuracies: float) -> list[StreamReport]:
        return [replace(one, manifest_hash=f"data{n}") for n, one in enumerate(seeds(method, *accuracies))]

    streams = [*by_seed("ssil", 0.8, 0.9, 0.8), *by_seed("er", 0.5, 0.6, 0.55)]
    text = printed(streams, significance=True)
    assert "demo: the data (manifest hash) differ from seed to seed" in text
    assert re.search(r"ssil .* best │$", text, re.MULTILINE)
    apart = [*seeds("ssil", 0.8), *other_data([stream(0.5, "method=er", "seed=1")])]
    assert "textbf" not in "\n".join(as_latex(apart, ["mean"]))


def test_fewer_than_three_common_seeds_have_no_p() -> None:
    few, enough = seeds("avcil", 0.7, 0.6), seeds("lwf", 0.5, 0.6, 0.4)
    text = printed([*seeds("ssil", 0.8, 0.9, 0.8), *few, *enough], significance=True)
    assert "– (2 seeds)" in text
    assert "it needs 3 common seeds" in text
    assert "– (1 seed)" in printed([*seeds("ssil", 0.8, 0.9, 0.8), *few[:1], *enough], significance=True)
    without = printed([*seeds("ssil", 0.8), *few], significance=True)
    assert "needs 3 common seeds with all steps, and there are at most 1" in without
    assert "best │" not in without


def test_seeds_that_give_the_same_accuracies_in_both_rows_are_one_result() -> None:
    closed_form = [*seeds("analytic", 0.976, 0.976, 0.976), *seeds("slda", 0.975, 0.975, 0.975)]
    text = as_format("md", closed_form, significance=True)
    assert "there are at most 1; rows that are the same for every seed (same) have one result" in text
    shown = json.loads(as_format("json", [*closed_form, *seeds("lwf", 0.5, 0.6, 0.55)], significance=True))["rows"]
    assert [row["p against the best"] for row in shown] == ["best", "– (same)", "0.005"]
    varied = {(seed, order): 0.5 + order / (8 + order) for seed in range(3) for order in range(4)}
    other = {key: value + (0.25, 0.125)[key[1] % 2] for key, value in varied.items()}
    one_seed = paired_test({key: varied[key] for key in varied if key[0] == 0}, other)
    assert paired_test(varied, other) == replace(one_seed, seeds_agree=True)
    assert one_seed.pairs == 4


def test_the_selected_epochs_of_the_steps_are_a_range_over_the_seeds() -> None:
    def trained(seed: int, *choices: EpochChoice | None) -> StreamReport:
        report = stream(0.5, f"seed={seed}")
        rows = tuple((0.5,) * (step + 1) for step in range(len(choices)))
        metrics = StreamMetrics(len(rows) - 1, rows, (0.5,) * len(rows), {}, 10, 0, None, choices=choices)
        return replace(report, metrics=metrics)

    first = trained(0, EpochChoice(2, 10, 0.5), EpochChoice(0, 10, 0.5, 3), None)
    second = trained(1, EpochChoice(4, 10, 0.5), EpochChoice(0, 10, 0.5))
    [row] = json.loads(as_format("json", [first, second]))["rows"]
    assert row["selected epoch of each step"] == "3–5  1*  –"
    assert "the first of them is kept" in printed([first])
    assert "selected epoch" not in printed([stream(0.5), trained(1, EpochChoice(0, 0))])


def test_equal_differences_need_no_division_by_their_deviation() -> None:
    values: dict[tuple[int, int | None], float] = {(0, None): 0.5, (1, None): 0.25, (2, None): 0.75}
    assert paired_test(values, values).p_value == 1
    assert paired_test({key: value + 0.25 for key, value in values.items()}, values).p_value == 0


PAPER = Paper(name="X", citation="X: a paper", url="https://example.org/x")


def published_on_demo() -> Published:
    return Published(
        papers={"x": PAPER},
        results=(
            Result(paper="x", benchmark="demo", metric="mean_accuracy", value=70.56),
            Result(paper="x", benchmark="demo", metric="mean_accuracy", value=58, method="joint"),
        ),
    )


def test_a_published_result_is_shown_with_its_source_and_the_difference() -> None:
    published = published_on_demo()
    streams = [
        *(stream(seen, f"seed={seed}") for seed, seen in enumerate((0.6, 0.7))),
        stream(0.6, "method=joint", "scenario.shuffle_seed=1"),
        stream(0.6, "name=demo2"),
        stream(0.6, "model.modality=audio", "method=lwf", "name=demo-modality-audio"),
        replace(stream(0.6, "method=ssil"), scenario=Scenario((("a",), ("b",)))),
    ]
    rows = json.loads(as_format("json", streams, published=published))["rows"]
    assert [row["paper"] for row in rows] == ["X", "X", "", "", "X"]
    assert [row["published mean accuracy"]["mean"] for row in rows] == [0.7056, 0.58, None, None, 0.7056]
    differences = [row["difference"]["mean"] for row in rows]
    assert differences == [pytest.approx(-0.0556), pytest.approx(0.02), None, None, None]
    assert rows[0]["difference"]["deviation"] == pytest.approx(0.005**0.5)
    first = next(csv.DictReader(io.StringIO(as_format("csv", streams, published=published))))
    assert (first["paper"], first["published mean accuracy"]) == ("X", "0.7056")
    assert float(first["difference"]) == pytest.approx(-0.0556)
    text = printed(streams, published=published)
    assert all(shown in text for shown in ("70.56", "58.00", "-5.6 ± 7.1", "+2.0", "X: a paper. https://example.org/x"))


@pytest.mark.parametrize(
    "other",
    ["scenario.imbalance=100", "scenario.classes_per_step=8", "data.limit.test=1", "memory.size=80"],
)
def test_a_stream_of_another_task_than_the_benchmarks_has_no_published_result(other: str) -> None:
    key, _, value = other.rpartition("=")
    swept = stream(0.6, other, f"name=demo-{key.rpartition('.')[2]}-{value}")
    assert published_on_demo().match(swept.config, "mean_accuracy") is None
    assert "published: no result of these benchmarks" in printed([swept], published=published_on_demo())
    assert "published &" not in "\n".join(as_latex([swept], published=published_on_demo()))
    both = json.loads(as_format("json", [stream(0.6), swept], published=published_on_demo()))["rows"]
    assert [row["difference"]["count"] for row in both] == [1, 0]


def test_every_shipped_result_has_a_source_and_a_benchmark() -> None:
    published = load_published()
    for result in published.results:
        load_config(result.benchmark)
        assert published.papers[result.paper].url.startswith("https://")
    assert {(r.benchmark, r.value) for r in published.results if r.paper == "mmal"} == {
        ("ave_ci", 76.71),
        ("ks_ci", 78.98),
        ("vs100_ci", 76.19),
    }


def test_a_result_without_its_paper_or_benchmark_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, result = tmp_path / "published.yaml", "results: [{paper: x, benchmark: none, metric: mean_accuracy, value: 3}]"
    own.write_text(f"papers: {{}}\n{result}\n")
    monkeypatch.setenv(SEARCH_PATH, str(tmp_path))
    with pytest.raises(ConfigError, match="paper 'x' is none of papers; add its source"):
        load_published()
    own.write_text(f"papers: {{x: {{name: X, citation: X, url: 'https://example.org/x'}}}}\n{result}\n")
    with pytest.raises(ConfigError, match=r"published.yaml: benchmark: none: no such file, and no benchmark"):
        load_published()
