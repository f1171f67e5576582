"""Published results: figures of papers with their sources, from `configs/published.yaml` or a file of the user's own.

The first `published.yaml` of the configurations' search path is read.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avcil_dist import storage
from avcil_dist.compose import load_config
from avcil_dist.config.loader import find_in_path
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten
from avcil_dist.config.variant_names import ORDER, benchmark_name
from avcil_dist.config.yaml_text import parse_yaml
from avcil_dist.errors import ConfigError

MAX_BYTES = 1 << 20
TASK = ("scenario.", "data.limit.", "memory.size")  # settings that define the task of a benchmark
Word = Annotated[str, Field(min_length=1, max_length=200)]
MetricName = Literal["mean_accuracy", "final_accuracy", "average_forgetting"]


class Paper(BaseModel):
    """A paper: the name of its method, a citation and the address of the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Word
    citation: Annotated[str, Field(min_length=1, max_length=1000)]
    url: Annotated[str, Field(pattern=r"^https://[^\s]+$", max_length=500)]
    note: Annotated[str, Field(max_length=1000)] = ""


class Result(BaseModel):
    """A figure of a paper, in %; `method` is the method here that it is of, if it is one of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    paper: Word
    benchmark: Word
    metric: MetricName
    value: Annotated[float, Field(ge=-100, le=100)]
    method: Word | None = None
    modality: Literal["both", "audio", "visual"] = "both"


class Published(BaseModel):
    """All published results."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    papers: dict[Word, Paper]
    results: tuple[Result, ...]

    @cached_property
    def by_metric(self) -> dict[str, list[Result]]:
        """The results of each metric."""
        return {name: [found for found in self.results if found.metric == name] for name in MetricName.__args__}  # type: ignore[attr-defined]

    @cached_property
    def tasks(self) -> dict[str, dict[str, Any]]:
        """The settings of each benchmark that define its task. Raises ConfigError for a benchmark without a file."""
        return {name: _task(load_config(name)) for name in dict.fromkeys(result.benchmark for result in self.results)}

    def match(self, config: Config, metric: MetricName) -> Result | None:
        """Return the result to compare a stream with: that of its method, else the best of any paper's method.

        None for a stream whose task is another than that of the benchmark: other steps, classes, clips or exemplars.
        """
        benchmark = benchmark_name(config)
        if self.tasks.get(benchmark) != _task(config):
            return None
        found = [
            result
            for result in self.by_metric[metric]
            if result.modality == config.model.modality and result.benchmark == benchmark
        ]
        own = [result for result in found if result.method == config.method.name]
        others = [result for result in found if result.method is None]
        return max(own or others, key=lambda result: result.value, default=None)

    def sources(self, results: Sequence[Result]) -> list[str]:
        """Return a line for each paper of these results."""
        papers = [self.papers[key] for key in dict.fromkeys(result.paper for result in results)]
        return [
            f"{paper.name}: {paper.citation}. {paper.url}{f' ({paper.note})' if paper.note else ''}" for paper in papers
        ]


def _task(config: Config) -> dict[str, Any]:
    """The settings that define the task. The class order is no part of it: rows of a table are over class orders."""
    return {key: value for key, value in flatten(config).items() if key.startswith(TASK) and key != ORDER}


def load_published() -> Published:
    """Read `published.yaml`. Raises ConfigError, naming file and value, for a faulty one."""
    path = find_in_path("", "published")
    if path is None:
        raise ConfigError("published.yaml: not found among the configurations; reinstall avcil-dist")
    try:
        published = Published.model_validate(parse_yaml(storage.read_bytes(str(path), max_bytes=MAX_BYTES).decode()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {storage.describe(error)}") from None
    for result in published.results:
        if result.paper not in published.papers:
            raise ConfigError(f"{path}: {result.benchmark}: paper {result.paper!r} is none of papers; add its source")
    try:
        _ = published.tasks
    except ConfigError as error:
        raise ConfigError(f"{path}: benchmark: {error}") from None
    return published
