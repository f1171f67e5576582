"""Class-incremental methods, one file each. The name of a method is that of its file."""

import importlib
import pkgutil

from pydantic import ValidationError

from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import Method

LONGEST_SHOWN = 80
NOT_METHODS = {"base", "evidence", "feature_sums", "losses", "nearest_mean", "sums_head"}


def method_names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in NOT_METHODS)


def method_class(name: str) -> type[Method]:
    """Return the class of a method. Raises ConfigError for an unknown name."""
    if name not in method_names():
        raise ConfigError(f"method.name: {name!r} is none of {', '.join(method_names())}")
    method: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
    return method


def make_method(config: MethodConfig) -> Method:
    """Return the method with its options. Raises ConfigError for options that it does not have.

    Settings of a user are checked when they are loaded; those of an artifact may be another version's.
    """
    kind = method_class(config.name)
    try:
        return kind(kind.Options.model_validate(config.model_extra))
    except ValidationError as error:
        fault = error.errors()[0]
        option = ".".join(map(str, fault["loc"]))[:LONGEST_SHOWN]
        raise ConfigError(f"method.{option}: {fault['msg']}; see `avcil methods`") from None
