"""Plug-ins: code of other installed packages that a setting names, by entry point or by `package.module:Class`.

The names come from the metadata of the installed packages. Code is imported when its name is used, and only code that
an installed entry point or the user's own configuration names: a name in an artifact, a shard or an answer of a server
is looked up, never imported for its own sake. `trust` records the references of the user's configuration; processes
that this one starts inherit the record, in the environment variable AVCIL_PLUGINS, which a user may set as well.
"""

import importlib
import importlib.util
import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from avcil_dist.errors import ConfigError
from avcil_dist.text.visible import visible

Group = Literal["methods", "encoders", "fusions", "trackers", "importers", "schedulers", "configs"]
VARIABLE = "AVCIL_PLUGINS"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}")
REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
MAX_SHOWN = 200  # characters of a foreign error


@dataclass(frozen=True)
class PlugIn:
    """Entry point of an installed package: the name of its object, the reference to it, and the package."""

    name: str
    reference: str
    package: str


@cache
def plug_ins(group: Group) -> tuple[PlugIn, ...]:
    """Return the entry points of a group, sorted by name. Nothing is imported."""
    found = metadata.entry_points(group=f"avcil_dist.{group}")
    points = {PlugIn(point.name, point.value, point.dist.name if point.dist else "?") for point in found}
    return tuple(sorted(points, key=lambda point: (point.name, point.package)))


def plug_in_names(group: Group, built_in: Collection[str]) -> list[str]:
    """Return the names of a group's plug-ins that can be used: well-formed, of one package, not built in."""
    names = [point.name for point in plug_ins(group)]
    return sorted(name for name in set(names) if not _fault(name, group, built_in))


def refused_plug_ins(group: Group, built_in: Collection[str]) -> list[str]:
    """Return a line for each plug-in whose name cannot be used, and the reason."""
    faults = [_fault(name, group, built_in) for name in sorted({point.name for point in plug_ins(group)})]
    return [fault for fault in faults if fault]


def check_name(setting: str, name: str, group: Group, built_in: Collection[str]) -> None:
    """Raise ConfigError, naming `setting`, for a name that two packages, or a package and this one, give."""
    if fault := _fault(name, group, built_in):
        raise ConfigError(f"{setting}: {fault}")


def is_reference(name: str) -> bool:
    """Whether a name has the form `package.module:Class`."""
    return REFERENCE.fullmatch(name) is not None


def label(name: str) -> str:
    """Return a plug-in's name as part of a file's name: of a reference, the class alone."""
    return name.rpartition(":")[2] if is_reference(name) else name


def trust(*references: str) -> None:
    """Permit this process, and those that it starts, to import what the user's configuration names.

    Names that are no references are left out: the entry point of an installed package vouches for them.
    """
    found = dict.fromkeys([*trusted(), *filter(is_reference, references)])
    if found:
        os.environ[VARIABLE] = ",".join(found)


def trusted() -> tuple[str, ...]:
    """Return the references that this process may import."""
    return tuple(name for name in os.environ.get(VARIABLE, "").split(",") if is_reference(name))


def is_known(name: str, group: Group) -> bool:
    """Whether the name is a reference, or the name of an installed plug-in."""
    return is_reference(name) or any(point.name == name for point in plug_ins(group))


def package_of(name: str, group: Group) -> str | None:
    """Return the package whose code a name stands for; None for a built-in name. Nothing is imported."""
    if is_reference(name):
        return name.partition(":")[0].partition(".")[0]
    return next((point.package for point in plug_ins(group) if point.name == name), None)


def load_plug_in(setting: str, name: str, group: Group, built_in: Collection[str]) -> Any:
    """Import the object that `setting` names.

    Raises ConfigError, one line that names the setting, for an unknown name, a reference that nobody but the text
    itself vouches for, and code that cannot be imported.
    """
    check_name(setting, name, group, built_in)
    if is_reference(name):
        vouched = [point for point in plug_ins(group) if point.reference.replace(" ", "") == name]
        if not vouched and name not in trusted():
            raise ConfigError(
                f"{setting}: {name!r} is code that your own configuration does not name; if you trust it, set "
                f"{VARIABLE}={name} in the environment, or {setting}={name} on a command line that takes settings"
            )
        return _import(setting, name, name)
    for point in plug_ins(group):
        if point.name == name:
            return _import(setting, point.reference, f"{name!r} of the package {point.package}")
    known = [*sorted(built_in), *plug_in_names(group, built_in)]
    raise ConfigError(
        f"{setting}: {visible(name)!r} is none of {', '.join(known)}; if it is a plug-in, install its package here"
    )


def config_folders() -> list[Path]:
    """Return the folders of configurations of installed packages: entry points such as `mine = "package.folder"`.

    The packages are located, not imported.
    """
    folders: list[Path] = []
    for point in plug_ins("configs"):
        package, *inner = point.reference.split(".")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        places: Sequence[str] = (spec and spec.submodule_search_locations) or ()
        folders.extend(Path(place, *inner) for place in places)
    return folders


def _fault(name: str, group: Group, built_in: Collection[str]) -> str | None:
    """Return why a name of a plug-in is refused, if it is."""
    packages = [point.package for point in plug_ins(group) if point.name == name]
    if not packages:
        return None
    if name in built_in:
        return (
            f"the package {packages[0]} has a plug-in with the built-in name {name!r}; rename its entry point, or "
            "uninstall it"
        )
    if not NAME.fullmatch(name):
        return f"the package {packages[0]} has a plug-in named {visible(name)!r}; use letters, digits, _ and -"
    if len(packages) > 1:
        return f"the packages {' and '.join(packages)} have plug-ins named {name!r}; uninstall one of them"
    return None


def _import(setting: str, reference: str, shown: str) -> Any:
    """Import an object. Whatever foreign code raises as it is imported becomes one line."""
    module, _, name = reference.replace(" ", "").partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        text = " ".join(str(error).split())[:MAX_SHOWN]
        raise ConfigError(
            f"{setting}: the plug-in {shown} cannot be imported ({type(error).__name__}: {visible(text)}); repair or "
            "uninstall its package"
        ) from error
