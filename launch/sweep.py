"""A grid of streams on the machine at hand, one after the other."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.errors import ConfigError
from avcil_dist.training.preflight import check_run

ABLATION = ("method.instance", "method.class_aware", "method.attention")
IN_EVERY_NAME = ("method", "method.name", "seed")  # a stream's name has them already
VALUE = re.compile(r"(?:[^,\[\]{}]|\[[^\]]*\]|\{[^}]*\})+")  # commas within brackets separate nothing


@dataclass(frozen=True)
class GridPoint:
    """One stream of a grid."""

    config: Config
    words: tuple[str, ...]


def make_grid(config: str, words: Sequence[str], *, ablation: bool, processes: int) -> list[GridPoint]:
    """The streams of all combinations of `key=a,b,c`, each held against the data and the processes.

    Settings other than method and seed become part of a stream's name. `ablation` adds every
    combination of avcil's three parts. Raises ConfigError, before anything has run.
    """
    axes = [_values(word) for word in words]
    if ablation:
        name = load_config(config, [axis[0] for axis in axes]).method.name
        if name != "avcil":
            raise ConfigError(f"--ablation: it is of avcil's parts, the method is {name}; say method=avcil")
        axes += [[f"{key}=true", f"{key}=false"] for key in ABLATION]
    varied = {axis[0].partition("=")[0] for axis in axes if len(axis) > 1}
    points = []
    for chosen in itertools.product(*axes):
        resolved = load_config(config, chosen)
        suffix = "".join(f"-{_slug(word)}" for word in chosen if word.partition("=")[0] in varied and _slug(word))
        point = GridPoint(resolved.model_copy(update={"name": resolved.name + suffix}), chosen)
        check_run(point.config, processes, restart=False)
        points.append(point)
    return points


def _values(word: str) -> list[str]:
    key, equals, text = word.partition("=")
    return [f"{key}={value}" for value in VALUE.findall(text)] if equals and text else [word]


def _slug(word: str) -> str:
    """A setting in a name: `no_part` for a part switched off, nothing for one that is on."""
    key, _, value = word.partition("=")
    name = key.rsplit(".", 1)[-1]
    if key in IN_EVERY_NAME or value == "true":
        return ""
    return f"no_{name}" if value == "false" else re.sub(r"[^A-Za-z0-9_-]+", "_", f"{name}-{value}")
