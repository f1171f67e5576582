"""Loading of settings: YAML files that extend others, named sections and `key=value` overrides, into one tree.

`extends:` names one file or several; later ones override earlier ones, and the file itself overrides them all.
A section that is a single word names a file of that section: `method: avcil` is `configs/method/avcil.yaml`. Files are
looked up in the folder of the file that names them, in the folders of AVCIL_CONFIG_PATH, in those of installed packages
(entry points `avcil_dist.configs`), and among the shipped ones. `by_method:` holds settings that apply to one method
each; `compose.py` selects them. Every value keeps its source (file or command line) for error messages.
"""

import errno
import os
import os.path
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

import avcil_dist
from avcil_dist import storage
from avcil_dist.config.validation_errors import explain_error
from avcil_dist.config.yaml_text import MAX_CHARACTERS, parse_yaml
from avcil_dist.errors import ConfigError
from avcil_dist.system.file_status import is_there
from avcil_dist.system.plugins import config_folders, is_known

SEARCH_PATH = "AVCIL_CONFIG_PATH"  # folders, separated as in PATH
MAX_BYTES = 4 * MAX_CHARACTERS + 1  # the bounds of `parse_yaml` in UTF-8
MAX_NAME = 255  # characters; more are no name of a file
NAMED_SECTIONS = ("method", "engine")
COMMAND_LINE = "command line"
BY_METHOD = "by_method"

Values = dict[str, Any]
M = TypeVar("M", bound=BaseModel)


@dataclass
class SettingsTree:
    """Nested settings, and the source of each dotted key: the name of a file, or COMMAND_LINE."""

    file: str  # the file that was loaded; the source of keys without one
    values: Values = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def merge(self, values: Values, source: str) -> None:
        """Override settings by `values`."""
        merge_values(self.values, values)
        self.sources |= dict.fromkeys(_dotted_keys(values), source)

    def override(self, override: str) -> None:
        """Apply one `section.key=value` of the command line. Raises ConfigError for another form."""
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
        try:
            value = parse_yaml(text)
        except yaml.YAMLError:
            value = text
        word = text.strip()
        if "#" in word and word[0] not in "'\"" and (value is None or isinstance(value, str)):
            value = word  # a word of a command line has no comment
        if key in NAMED_SECTIONS and isinstance(value, str):
            self.values[key] = _named_section(key, value, COMMAND_LINE, None)
            return
        *sections, leaf = key.split(".")
        node = self.values
        for depth, section in enumerate(sections, start=1):
            child = node.setdefault(section, {})
            self.sources.setdefault(".".join(sections[:depth]), COMMAND_LINE)
            if not isinstance(child, dict):
                raise ConfigError(f"{COMMAND_LINE}: {key}: {section!r} is a value, not a section")
            node = child
        node[leaf] = value
        self.sources = {name: source for name, source in self.sources.items() if not name.startswith(f"{key}.")}
        self.sources[key] = COMMAND_LINE

    def validate(self, model: type[M]) -> M:
        """Return the validated model. Raises ConfigError, one line that names source, key, value and what is valid."""
        try:
            return model.model_validate(self.values)
        except ValidationError as error:
            raise ConfigError(explain_error(error, self.values, model, self.source_of)) from None

    def source_of(self, key: str) -> str:
        """Return the source of a key, or of the nearest section that contains it."""
        ends = [len(key), *(i for i in range(len(key) - 1, -1, -1) if key[i] == ".")]
        return next((self.sources[key[:end]] for end in ends if key[:end] in self.sources), self.file)


def load_settings(path: Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """Load a file of another model than Config, with overrides. Raises ConfigError as `SettingsTree.validate` does."""
    tree = read_tree(path)
    for override in overrides:
        tree.override(override)
    return tree.validate(model)


def shipped_configs() -> Path:
    """Return the folder of the shipped files: in the package when installed, beside it in a checkout."""
    package = Path(avcil_dist.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def search_path() -> list[Path]:
    """Return the folders in which names of configurations are looked up, the shipped ones last."""
    own = [Path(entry).expanduser() for entry in os.environ.get(SEARCH_PATH, "").split(os.pathsep) if entry]
    return [*own, *config_folders(), shipped_configs()]


def find_in_path(section: str, name: str, own_folder: Path | None = None) -> Path | None:
    """Return the first file `SECTION/NAME.yaml` of `own_folder` and the search path, or None.

    Raises ConfigError where an installed package has a file of a shipped name: the word would change its meaning.
    """
    if len(name) > MAX_NAME:
        return None
    shipped, packages = shipped_configs(), config_folders()
    found = None
    for folder in (*([own_folder] if own_folder else []), *search_path()):
        path = folder / section / f"{name}.yaml"
        if found is None and is_file(path):
            found = path
        if folder in packages and is_file(path) and is_file(shipped / section / path.name):
            raise ConfigError(f"{path}: a package has a configuration of the shipped name {name!r}; uninstall it")
    return found


def find_config(name: str) -> Path:
    """Return the path of a file, or of the benchmark of that name in the search path.

    Raises ConfigError where neither exists.
    """
    if is_file(Path(name)):
        return Path(name)
    if found := find_in_path("benchmark", name) or find_in_path("", name):
        return found
    if len(name) > MAX_NAME:
        raise ConfigError(f"{name[:MAX_NAME]}…: no such file; the name is too long")
    if Path(name).is_dir():
        raise ConfigError(f"{name}: a folder; give a yaml file, or the name of a benchmark")
    names = ", ".join(names_in_path("benchmark"))
    raise ConfigError(f"{name}: no such file, and no benchmark of that name (there are: {names})")


def names_in_path(section: str, own_folder: Path | None = None) -> list[str]:
    """Return the names of a section's files in `own_folder` and the search path."""
    folders = (*([own_folder] if own_folder else []), *search_path())
    return sorted({path.stem for folder in folders for path in (folder / section).glob("*.yaml")})


def is_file(path: Path) -> bool:
    """Whether there is a file. Raises ConfigError where its folder cannot be read."""
    try:
        return is_there(path) and path.is_file()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise ConfigError(f"{path}: {error.strerror}") from None


def read_tree(path: Path, extended_by: tuple[Path, ...] = ()) -> SettingsTree:
    """Read a file and all files that it extends. Raises ConfigError for unreadable files and for circles."""
    if path.resolve() in extended_by:
        raise ConfigError(f"{path}: extends itself, by way of {extended_by[-1].name}")
    document = _read_document(path)
    tree = SettingsTree(path.name)
    for base in _extended_files(path, document.pop("extends", [])):
        base_tree = read_tree(base, (*extended_by, path.resolve()))
        merge_values(tree.values, base_tree.values)
        tree.sources |= base_tree.sources
    for settings in settings_by_method(tree).values():
        _remove_overridden(settings, document)
    for section in NAMED_SECTIONS:
        if isinstance(document.get(section), str):
            document[section] = _named_section(section, document[section], path.name, path.parent)
            tree.values.pop(section, None)
    tree.merge(document, path.name)
    return tree


def settings_by_method(tree: SettingsTree) -> dict[str, Values]:
    """Return the settings under `by_method`. Raises ConfigError where they are not a mapping of mappings."""
    by_method = tree.values.get(BY_METHOD, {})
    if not isinstance(by_method, dict) or not all(isinstance(settings, dict) for settings in by_method.values()):
        raise ConfigError(f"{tree.file}: {BY_METHOD}: a mapping of methods to settings, each as in a file of its own")
    return by_method


def merge_values(values: Values, other: Values) -> None:
    """Override `values` by `other`, section by section."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            merge_values(values[key], value)
        else:
            values[key] = value


def _read_document(path: Path) -> Values:
    try:
        with storage.open_regular(path) as file:
            document = parse_yaml(file.read(MAX_BYTES).decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is {type(document).__name__}")
    return document


def _extended_files(path: Path, extends: Any) -> list[Path]:
    """Return the files that `path` extends, each relative to its folder or a shipped name."""
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: {extends!r} is neither a file nor a list of files")
    files = [(path.parent / os.path.expanduser(name), name) for name in names]  # noqa: PTH111 - `Path` raises for ~nobody
    try:
        return [file if is_file(file) else find_config(name) for file, name in files]
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None


def _remove_overridden(settings: Values, document: Values) -> None:
    """Remove from a method's settings what the document sets: a file overrides the files that it extends."""
    for key, value in document.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _remove_overridden(settings[key], value)
        elif not (key in NAMED_SECTIONS and isinstance(value, str)):  # a named section sets no single key
            settings.pop(key, None)


def _named_section(section: str, name: str, source: str, own_folder: Path | None) -> Values:
    """Return the settings of a named section: a file's, or the name alone of a method without a file."""
    if Path(name).name == name and (found := find_in_path(section, name, own_folder)):
        return _read_document(found)
    if section == "method" and is_known(name, "methods"):
        return {"name": name}
    raise ConfigError(f"{source}: {section}: {name!r} is none of {', '.join(names_in_path(section, own_folder))}")


def _dotted_keys(values: Values, prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _dotted_keys(value, f"{prefix}{key}.")
