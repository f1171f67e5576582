"""Names of the streams of a sweep: the name of the configuration, then each setting that varies."""

import re
from collections.abc import Iterable

from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import flatten

ORDER = "scenario.shuffle_seed"
IN_EVERY_NAME = ("method", "method.name", "seed", "name")  # settings that every stream's name contains


def variant_name(name: str, settings: Iterable[tuple[str, str]]) -> str:
    """Return a name with settings (dotted key, value as text) behind it."""
    return "".join([name, *(f"-{slug}" for key, value in settings if (slug := setting_slug(key, value)))])


def benchmark_name(config: Config) -> str:
    """Return the name of a configuration without the settings of its own that `variant_name` put behind it."""
    slugs = {
        setting_slug(key, str(value).lower() if isinstance(value, bool) else str(value))
        for key, value in flatten(config).items()
    }
    ends = sorted((f"-{slug}" for slug in slugs if slug), key=len, reverse=True)
    name = config.name
    while end := next((end for end in ends if name.endswith(end) and name != end), None):
        name = name.removesuffix(end)
    return name


def setting_slug(key: str, value: str) -> str:
    """Return a setting as part of a name: `no_part` for a part switched off, nothing for one that is on."""
    name = key.rsplit(".", 1)[-1]
    if key in IN_EVERY_NAME or value == "true":
        return ""
    if key == ORDER:
        return f"order{value}"
    return f"no_{name}" if value == "false" else re.sub(r"[^A-Za-z0-9_-]+", "_", f"{name}-{value}")
