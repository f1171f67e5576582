"""Reports of streams, read from their step artifacts: tables for a terminal. `page.py` makes a page of them.

Only committed steps count. No tracking server is contacted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console

from avcil_dist import storage
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_to_yaml
from avcil_dist.errors import ArtifactError
from avcil_dist.reporting.tables import WordTable
from avcil_dist.scenario import Scenario
from avcil_dist.streams.metrics import MemoryUse, StreamMetrics
from avcil_dist.streams.summary import committed_steps, load_summary

TIES_NOTE = "* later epochs are as good on the validation clips; the first of them is kept"


@dataclass(frozen=True)
class StreamReport:
    """A stream at its last committed step. `manifest_hash` identifies its data."""

    folder: str
    config: Config
    scenario: Scenario
    metrics: StreamMetrics
    manifest_hash: str

    @property
    def label(self) -> str:
        """Benchmark, method and seed as a title."""
        return f"{self.config.name} · {self.config.method.name} · seed {self.config.seed}"

    @property
    def progress(self) -> str:
        """Committed steps of all steps, such as 2/4."""
        return f"{self.metrics.step + 1}/{self.scenario.num_steps}"

    @property
    def settings(self) -> str:
        """The resolved configuration as YAML."""
        return config_to_yaml(self.config)


def load_streams(folders: Sequence[str]) -> list[StreamReport]:
    """Load the streams in these folders; a folder of stream folders gives all of them, in order of name.

    Raises ArtifactError for a folder without a committed step, and for a damaged or unreadable step.
    """
    streams: dict[str, StreamReport] = {}
    for folder in folders:
        loaded = {
            path: stream
            for path in (folder, *(storage.join(folder, name) for name in storage.list_folder(folder)))
            if (stream := _load_stream(path.rstrip("/"))) is not None
        }
        if not loaded:
            below = ", ".join(_outputs_below(folder))
            remedy = f"give one with streams: {below}" if below else "give the output folder of `avcil train`"
            raise ArtifactError(
                f"{folder}: no committed step (searched for step_*/COMMITTED.json there and one folder down); {remedy}"
            )
        streams |= loaded
    return list(streams.values())


def _outputs_below(folder: str) -> list[str]:
    """Return the folders in this one that hold streams: outputs of different commands, which are not mixed."""
    inner = [storage.join(folder, name) for name in storage.list_folder(folder)]
    return [
        path for path in inner if any(committed_steps(storage.join(path, name)) for name in storage.list_folder(path))
    ]


def print_report(streams: Sequence[StreamReport], console: Console) -> None:
    """Print a summary with a row per stream, then each stream's accuracy matrix. Numbers are %."""
    summary = WordTable("Streams (accuracy on test clips, %)", num_keys=3)
    for heading in ("benchmark", "method"):
        summary.add_column(heading)
    for heading in (
        "seed",
        "steps",
        "seen accuracy after each step",
        "mean accuracy",
        "average forgetting",
        "selected epoch of each step",
        "memory, MB",
    ):
        summary.add_column(heading, justify="right")
    for stream in streams:
        metrics = stream.metrics
        summary.add_row(
            stream.config.name,
            stream.config.method.name,
            str(stream.config.seed),
            stream.progress,
            "  ".join(percent(value) for value in metrics.seen_accuracy),
            percent(metrics.mean_accuracy),
            percent(metrics.average_forgetting),
            "  ".join("–" if choice is None else str(choice) for choice in metrics.choices) or "–",
            megabytes(metrics.memory),
        )
    console.print(summary)
    if any(choice and choice.num_ties for stream in streams for choice in stream.metrics.choices):
        console.print(TIES_NOTE, highlight=False)
    for stream in streams:
        matrix = WordTable(f"{stream.label}: accuracy on each task, %")
        matrix.add_column("after step", justify="right")
        for task, size in enumerate(task_sizes(stream)):
            matrix.add_column(f"task {task}\n{size} classes", justify="right")
        for step, row in enumerate(stream.metrics.accuracy):
            matrix.add_row(str(step), *(percent(value) for value in row))
        console.print(matrix)


def percent(fraction: float | None) -> str:
    """Format a fraction as % with one decimal, without the sign; None as –."""
    return "–" if fraction is None else f"{100 * fraction + 0.0:.1f}"


def megabytes(memory: MemoryUse | None) -> str:
    """Format the memory of a stream after its last step in MB (10⁶ bytes); – where it was not recorded."""
    return "–" if memory is None else f"{memory.bytes / 1e6:,.1f}"


def _load_stream(folder: str) -> StreamReport | None:
    """Load the stream in `folder` at its last committed step; None where no step is committed."""
    committed = committed_steps(folder)
    if not committed:
        return None
    summary = load_summary(folder, committed[-1])
    return StreamReport(folder, summary.config, summary.scenario, summary.metrics, summary.manifest_hash)


def task_sizes(stream: StreamReport) -> list[int]:
    """The number of classes of each task learnt so far."""
    return [len(stream.scenario.new(task)) for task in range(stream.metrics.step + 1)]
