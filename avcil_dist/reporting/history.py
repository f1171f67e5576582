"""All committed steps of a stream, as the report page needs them: metrics, time and hardware of each."""

from collections.abc import Sequence
from dataclasses import dataclass

from avcil_dist.reporting.report import StreamReport
from avcil_dist.streams.metrics import StreamMetrics
from avcil_dist.streams.summary import StepCommit, committed_folder, committed_steps, load_metrics

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class StreamHistory:
    """A stream with its committed steps. A stream that was resumed on another machine may lack the earlier ones."""

    stream: StreamReport
    steps: Sequence[tuple[StepCommit, StreamMetrics]]

    @property
    def seconds(self) -> float:
        """Time of all steps."""
        return sum(commit.seconds for commit, _ in self.steps)

    @property
    def hardware(self) -> list[str]:
        """Number of processes and device of each step, such as `8 × NVIDIA H100`, without repetitions."""
        known = [f"{commit.ranks} × {commit.device or '?'}" for commit, _ in self.steps if commit.ranks]
        return list(dict.fromkeys(known))

    @property
    def gpu_hours(self) -> float | None:
        """Processes × time on GPUs; None where a step ran on the CPU or has no record."""
        if any(not commit.ranks or commit.device in ("", "cpu") for commit, _ in self.steps):
            return None
        return sum(commit.ranks * commit.seconds for commit, _ in self.steps) / SECONDS_PER_HOUR

    @property
    def versions(self) -> list[str]:
        """Version of the program, with its git commit where it is known, without repetitions."""
        found = [f"{commit.code_version} {commit.source}".strip() for commit, _ in self.steps]
        return list(dict.fromkeys(found))

    @property
    def manifest_hash(self) -> str:
        """Content hash of the data set."""
        return self.steps[-1][0].manifest_hash


def load_history(stream: StreamReport) -> StreamHistory:
    """Read the small files of all committed steps. Raises ArtifactError as `load_summary` does."""
    folder = stream.folder
    return StreamHistory(
        stream, [(committed_folder(folder, step)[1], load_metrics(folder, step)) for step in committed_steps(folder)]
    )


def duration(seconds: float) -> str:
    """Format a time: `45 s`, `12 min`, `3.5 h`; – for none."""
    if seconds >= SECONDS_PER_HOUR:
        return f"{seconds / SECONDS_PER_HOUR:.1f} h"
    return "–" if not seconds else f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
