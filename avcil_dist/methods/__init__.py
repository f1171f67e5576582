"""Class-incremental methods, one file each, and those of plug-ins. The name of a method is that of its file."""

import importlib

from pydantic import ValidationError

from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods.base import Method
from avcil_dist.system.plugins import check_name, load_plug_in

LONGEST_SHOWN = 80


def method_names() -> list[str]:
    """Return the names of the built-in methods."""
    return sorted(METHOD_OPTIONS)


def method_class(name: str) -> type[Method]:
    """Return the class of a method: of the name of a built-in one, of a plug-in, or of `package.module:Class`.

    Raises ConfigError as `load_plug_in` does, and for a plug-in that is no method.
    """
    built_in = method_names()
    if name in built_in:
        check_name("method.name", name, "methods", built_in)
        method: type[Method] = importlib.import_module(f"{__name__}.{name}").METHOD
        return method
    found = load_plug_in("method.name", name, "methods", built_in)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise ConfigError(f"method.name: the plug-in {name!r} is no class derived from avcil_dist.methods.base.Method")
    return found


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
