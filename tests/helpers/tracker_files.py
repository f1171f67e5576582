"""Values in the files of TensorBoard and of Weights & Biases, read by these packages' own programs."""

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

Values = dict[str, list[tuple[int, float]]]
AXES = ("incremental_step", "iteration", "seconds")


def tensorboard_values(folder: Path) -> dict[str, Values]:
    """The values of each run by metric, in the order of the file; a run is `stream` or the number of a step."""
    found: dict[str, Values] = {}
    for run in sorted(folder.iterdir()):
        [file] = run.iterdir()
        values: Values = defaultdict(list)
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    values[value.tag].append((event.step, value.tensor.float_val[0]))
        found[run.name if run.name == "stream" else str(int(run.name.removeprefix("step_")))] = dict(values)
    return found


def wandb_records(run: Path) -> list[dict[str, Any]]:
    """The records of an offline run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run)]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in shown.splitlines()]


def wandb_values(folder: Path) -> dict[str, Values]:
    """As `tensorboard_values`."""
    found: dict[str, Values] = {}
    for run in sorted(folder.iterdir()):
        records = wandb_records(run)
        assert [record["num"] for record in records] == list(range(1, len(records) + 1))
        rows = [record["history"] for record in records if record["type"] == "history"]
        assert [row["step"].get("num", 0) for row in rows] == list(range(len(rows)))
        values: Values = defaultdict(list)
        for row in rows:
            [axis] = [row["item"][name] for name in AXES if name in row["item"]]
            for name, value in row["item"].items():
                if name not in AXES and not name.startswith("_"):
                    values[name].append((axis, value))
        [of_run] = [record["run"] for record in records if record["type"] == "run"]
        name = of_run["run_id"].rpartition("-step")
        found[str(int(name[2])) if name[1] else "stream"] = dict(values)
    return found
