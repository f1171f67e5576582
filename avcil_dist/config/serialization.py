"""A resolved configuration as YAML text and as flat dotted keys."""

from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from avcil_dist.config.schema import Config
from avcil_dist.config.yaml_text import parse_yaml
from avcil_dist.errors import ConfigError


def config_to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_from_yaml(text: str) -> Config:
    """Return the configuration that `config_to_yaml` wrote. Raises ConfigError for any other text."""
    try:
        return Config.model_validate(parse_yaml(text))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"not a resolved configuration: {str(error).splitlines()[0]}") from None


def flatten(config: Config) -> dict[str, Any]:
    """Return all settings by dotted key, in the order of the schema."""

    def walk(prefix: str, node: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            yield prefix, node

    return dict(walk("", config.model_dump(mode="json")))
