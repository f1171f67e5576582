"""Tables of an evaluation for a terminal: a row for each condition, and the steps with their accuracy matrix. %.

They are made of the results of `avcil eval`, which are otherwise printed as JSON.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from avcil_dist.reporting.report import percent
from avcil_dist.reporting.tables import WordTable

Results = Mapping[str, Any]
METRICS = {
    "top5_accuracy": "top-5",
    "mean_average_precision": "macro mAP",
    "task_il_accuracy": "Task-IL",
}
NOISY = (("audio_db", "sound"), ("visual_db", "pictures"))
ALONE = {"audio": "sound alone", "visual": "pictures alone"}


def evaluation_tables(results: Results) -> list[WordTable]:
    """Return the tables of an evaluation's results, as `--robustness` and `--all-steps` made them."""
    tables = [_conditions(results)]
    if "all_steps" in results:
        tables.append(_steps(results["all_steps"], results.get("forward_transfer")))
    elif "forward_transfer" in results:
        table = WordTable("Forward transfer, %")
        table.add_column("from step", justify="right")
        table.add_column("to the next task", justify="right")
        for step, gain in enumerate(results["forward_transfer"]["by_step"]):
            table.add_row(str(step), percent(gain))
        tables.append(table)
    return tables


def _conditions(results: Results) -> WordTable:
    clips = f"{results['num_clips']} clips of {results['split']}"
    damaged = f", {results['num_damaged']} damaged" if results["num_damaged"] else ""
    table = WordTable(f"{results['stream']}, step {results['step']}: {clips}{damaged}, %")
    table.add_column("inputs", no_wrap=True)
    has_interval = "intervals" in results
    headings = ["accuracy", *(["95% interval"] if has_interval else []), *METRICS.values()]
    tasks = [f"task {task}" for task in range(len(results["task_accuracy"]))]
    for heading in [*headings, *tasks]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (results, *results.get("robustness", ())):
        bounds = row["intervals"]["seen_accuracy"] if "intervals" in row else row.get("interval")
        table.add_row(
            condition_name(row),
            percent(row["seen_accuracy"]),
            *([f"{percent(bounds[0])}–{percent(bounds[1])}"] if has_interval and bounds else []),
            *(percent(row[name]) for name in METRICS),
            *map(percent, row["task_accuracy"]),
        )
    return table


def condition_name(row: Results) -> str:
    """Return the inputs of an evaluation in words, such as `sound alone, sound at 10 dB`; dB is that of the noise."""
    noise = row["noise"] or {}
    words = [ALONE[row["modality"]]] if row["modality"] in ALONE else []
    words += [f"{name} at {noise[key]:g} dB" for key, name in NOISY if noise.get(key) is not None]
    return ", ".join(words) or "both"


def _steps(results: Results, transfer: Results | None) -> WordTable:
    """The matrix of accuracies with what follows from it, a row for each step."""
    matrix = results["accuracy"]
    summary = [f"mean accuracy {percent(results['mean_accuracy'])}"]
    summary += [f"average forgetting {percent(results['average_forgetting'])}"]
    summary += [f"BWT {percent(results['backward_transfer'])}"]
    summary += [f"FWT {percent(transfer['mean'])}"] if transfer else []
    table = WordTable(f"After each step, %: {', '.join(summary)}")
    for heading in _headings(len(matrix), transfer):
        table.add_column(heading, justify="right", no_wrap=True)
    for step, row in enumerate(matrix):
        gains = (transfer or {}).get("by_step", ())
        table.add_row(
            str(step),
            percent(results["seen_accuracy"][step]),
            percent(results["forgetting"][step - 1] if step else None),
            *([percent(gains[step] if step < len(gains) else None)] if transfer else []),
            *map(percent, row),
        )
    return table


def _headings(num_tasks: int, transfer: Results | None) -> Iterator[str]:
    yield from ("step", "accuracy", "forgetting")
    if transfer:
        yield "FWT"
    yield from (f"task {task}" for task in range(num_tasks))
