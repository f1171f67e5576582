"""Grid of streams: every combination of several values of settings."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.config.variant_names import ORDER, variant_name
from avcil_dist.errors import ConfigError
from avcil_dist.training.preflight import preflight
from launch.smoke import smoke_config

ABLATION = ("method.instance", "method.class_aware", "method.attention")
CLOSING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class GridPoint:
    """One stream of a grid; `overrides` are the settings that were chosen for it."""

    config: Config
    overrides: tuple[str, ...]


def num_points(words: Sequence[str], *, ablation: bool, class_orders: int = 1) -> int:
    """Return the number of streams of `make_grid`."""
    combinations = math.prod(len(split_values(word)) for word in words) * class_orders
    return combinations * (2 ** len(ABLATION) if ablation else 1)


def make_grid(
    config: str,
    words: Sequence[str],
    *,
    ablation: bool,
    processes: int,
    class_orders: int = 1,
    smoke: bool = False,
    checked: bool = True,
) -> list[GridPoint]:
    """Return the streams of all combinations of `key=a,b,c`, `checked` against the data and the processes.

    Settings other than method and seed become part of a stream's name. `ablation` adds every combination of avcil's
    three parts, `class_orders` > 1 so many random orders of the classes, of the seeds 0, 1, …. `smoke` makes them smoke
    runs. Raises ConfigError before anything has run.
    """
    axes = [split_values(word) for word in words]
    if class_orders > 1:
        if any(axis[0].partition("=")[0] == ORDER for axis in axes):
            raise ConfigError(f"--class-orders: it varies {ORDER}, which is set too; leave out one of them")
        axes.append([f"{ORDER}={seed}" for seed in range(class_orders)])
    if ablation:
        name = load_config(config, [axis[0] for axis in axes]).method.name
        if name != "avcil":
            raise ConfigError(f"--ablation: it varies the parts of avcil, and the method is {name}; set method=avcil")
        axes += [[f"{key}=true", f"{key}=false"] for key in ABLATION]
    varied = {axis[0].partition("=")[0] for axis in axes if len(axis) > 1}
    points = []
    for overrides in itertools.product(*axes):
        resolved = load_config(config, overrides)
        pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in overrides]
        name = variant_name(resolved.name, [pair for pair in pairs if pair[0] in varied])
        named = resolved.model_copy(update={"name": name})
        point = GridPoint(smoke_config(named) if smoke else named, overrides)
        if checked:
            preflight(point.config, [processes], restart=smoke)
        points.append(point)
    return points


def split_values(word: str) -> list[str]:
    """Split `key=a,b` into `key=a` and `key=b`; commas within brackets do not separate.

    Raises ConfigError for an empty value and for brackets that do not match.
    """
    key, equals, text = word.partition("=")
    if not (equals and text):
        return [word]
    values, expected = [""], ""
    for letter in text:
        if letter == "," and not expected:
            values.append("")
            continue
        if letter in CLOSING:
            expected = CLOSING[letter] + expected
        elif letter in CLOSING.values():
            if not expected.startswith(letter):
                raise ConfigError(f"command line: {word}: {letter!r} without its opening bracket")
            expected = expected[1:]
        values[-1] += letter
    if expected:
        raise ConfigError(f"command line: {word}: {expected[0]!r} is missing")
    if "" in values:
        raise ConfigError(f"command line: {word}: an empty value between two commas, or before or after them")
    return [f"{key}={value}" for value in values]
