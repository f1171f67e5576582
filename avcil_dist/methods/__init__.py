"""Class-incremental methods, one file each; a method is found by the name of its file."""

import importlib
import pkgutil

from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import Method

NOT_METHODS = {"base", "losses", "nearest_mean"}


def method_names() -> list[str]:
    """The names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a method. Raises ConfigError for a name that is none."""
    if name not in method_names():
        raise ConfigError(f"method.name: {name!r} is none of {', '.join(method_names())}")
    found: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return found


def make_method(config: MethodConfig) -> Method:
    """The method with its options."""
    kind = method_class(config.name)
    return kind(kind.Options.model_validate(config.model_extra))
