"""From files and `key=value` words to a `Config`.

A file may say `extends:` (one file or several; later ones win, the file itself wins last).
A section that is a single word names a shipped file of that section: `method: avcil` is
`configs/method/avcil.yaml`. A file may also say `by_method:`, settings that hold for one method
each; those of the method that is run count as said by that file, so that a file which extends it,
and the command line, have the last word. Every value remembers which file said it, for the error line.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

import avcil_dist
from avcil_dist.config.schema import Config, MethodConfig
from avcil_dist.errors import ConfigError
from avcil_dist.methods import method_class

NAMED_SECTIONS = ("method", "engine")
COMMAND_LINE = "command line"
BY_METHOD = "by_method"

Tree = dict[str, Any]
M = TypeVar("M", bound=BaseModel)
Origins = dict[str, str]


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration of a file or shipped name, with `section.key=value` overrides.

    Raises ConfigError, one line that names file, key, value and what is allowed.
    """
    path = find_config(name)
    tree, origins = _read(path, chain=())
    chosen = [word for word in overrides if word.partition("=")[0] in ("method", "method.name")]
    for override in chosen:  # which method it is decides what `by_method` says, and the other words come after that
        _override(tree, origins, override)
    _resolve_by_method(tree, origins, path.name)
    for override in overrides:
        if override not in chosen:
            _override(tree, origins, override)
    return _validated(tree, origins, path.name)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """A resolved configuration with `section.key=value` overrides. Raises ConfigError as `load_config` does."""
    tree, origins = config.model_dump(mode="json"), Origins()
    for override in overrides:
        _override(tree, origins, override)
    return _validated(tree, origins, COMMAND_LINE)


def _validated(tree: Tree, origins: Origins, file: str) -> Config:
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, origins, Config, file)) from None
    try:
        kind = method_class(config.method.name).Options
    except ConfigError as error:
        raise ConfigError(f"{_said_by('method.name', origins, file)}: {error}") from None
    try:
        options = kind.model_validate(config.method.model_extra)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree["method"], origins, kind, file, section="method")) from None
    return config.model_copy(update={"method": MethodConfig(name=config.method.name, **options.model_dump())})


def load_settings(path: Path, model: type[M], overrides: Sequence[str] = ()) -> M:
    """A file of settings of their own kind, with overrides. Raises ConfigError as `load_config` does."""
    tree, origins = _read(path, chain=())
    for override in overrides:
        _override(tree, origins, override)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, origins, model, path.name)) from None


def config_from_yaml(text: str) -> Config:
    """The configuration that `config_to_yaml` wrote."""
    try:
        return Config.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        raise ConfigError(f"not a resolved configuration: {str(error).splitlines()[0]}") from None


def config_to_yaml(config: Config) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def flatten(config: Config) -> dict[str, Any]:
    """Dotted keys to values, as trackers take them."""

    def walk(prefix: str, node: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(node, Mapping):
            for key, value in node.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, value)
        else:
            yield prefix, node

    return dict(walk("", config.model_dump(mode="json")))


def shipped_configs() -> Path:
    """The folder of the shipped files: beside the package when installed, above it in a checkout."""
    package = Path(avcil_dist.__file__).parent
    return package / "configs" if (package / "configs").is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """A path as it is, or the shipped benchmark of that name."""
    shipped = shipped_configs()
    for path in (Path(name), shipped / "benchmark" / f"{name}.yaml", shipped / f"{name}.yaml"):
        if path.is_file():
            return path
    names = sorted(path.stem for path in (shipped / "benchmark").glob("*.yaml"))
    raise ConfigError(f"{name}: no such file, and no shipped benchmark of that name (there are: {', '.join(names)})")


def _read(path: Path, chain: tuple[Path, ...]) -> tuple[Tree, Origins]:
    if path.resolve() in chain:
        raise ConfigError(f"{path}: extends itself, by way of {chain[-1].name}")
    try:
        document = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is {type(document).__name__}")
    tree: Tree = {}
    origins: Origins = {}
    for base in _bases(path, document.pop("extends", [])):
        base_tree, base_origins = _read(base, (*chain, path.resolve()))
        _merge(tree, base_tree)
        origins |= base_origins
    for settings in _by_method(tree, path.name).values():
        _forget(settings, document)
    for section in NAMED_SECTIONS:
        if isinstance(document.get(section), str):
            document[section] = _named_section(section, document[section], path.name)
            tree.pop(section, None)
    _merge(tree, document)
    origins |= dict.fromkeys(_keys(document), path.name)
    return tree, origins


def _by_method(tree: Tree, file: str) -> dict[str, Tree]:
    """The settings by method. Raises ConfigError where they are no mapping of mappings."""
    found = tree.get(BY_METHOD, {})
    if not isinstance(found, dict) or not all(isinstance(settings, dict) for settings in found.values()):
        raise ConfigError(f"{file}: {BY_METHOD}: a mapping of methods to settings, each as in a file of its own")
    return found


def _resolve_by_method(tree: Tree, origins: Origins, file: str) -> None:
    """Put the chosen method's settings in their places, and drop the others'."""
    by_method = _by_method(tree, file)
    tree.pop(BY_METHOD, None)
    for name in by_method:
        try:
            method_class(name)
        except ConfigError as error:
            raise ConfigError(f"{file}: {BY_METHOD}: {error}") from None
    section = tree.get("method")
    chosen = str(section.get("name")) if isinstance(section, dict) else ""
    settings = by_method.get(chosen, {})
    _merge(tree, settings)
    said_by = origins.get(f"{BY_METHOD}.{chosen}", file)
    origins |= dict.fromkeys(_keys(settings), f"{said_by} ({BY_METHOD}.{chosen})")


def _forget(settings: Tree, document: Tree) -> None:
    """Drop what the document says itself: a file that extends another has the last word, for every method."""
    for key, value in document.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _forget(settings[key], value)
        elif not (key in NAMED_SECTIONS and isinstance(value, str)):  # a name is no word on what the section holds
            settings.pop(key, None)


def _bases(path: Path, extends: Any) -> list[Path]:
    """The files that `path` extends, each beside it or by shipped name."""
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: extends: {extends!r} is neither a file nor a list of files")
    try:
        return [path.parent / name if (path.parent / name).is_file() else find_config(name) for name in names]
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None


def _named_section(section: str, name: str, said_by: str) -> Tree:
    shipped = {file.stem: file for file in sorted((shipped_configs() / section).glob("*.yaml"))}
    if name not in shipped:
        raise ConfigError(f"{said_by}: {section}: {name!r} is none of {', '.join(shipped)}")
    return dict(yaml.safe_load(shipped[name].read_text()))


def _override(tree: Tree, origins: Origins, override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{COMMAND_LINE}: {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if key in NAMED_SECTIONS and isinstance(value, str):
        tree[key] = _named_section(key, value, COMMAND_LINE)
        return
    *sections, leaf = key.split(".")
    node = tree
    for depth, section in enumerate(sections, start=1):
        child = node.setdefault(section, {})
        origins.setdefault(".".join(sections[:depth]), COMMAND_LINE)
        if not isinstance(child, dict):
            raise ConfigError(f"{COMMAND_LINE}: {key}: {section!r} is a value, not a section")
        node = child
    node[leaf] = value
    origins[key] = COMMAND_LINE


def _merge(tree: Tree, other: Tree) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            _merge(tree[key], value)
        else:
            tree[key] = value


def _keys(tree: Tree, prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")


def _explain(
    error: ValidationError, tree: Tree, origins: Origins, model: type[BaseModel], file: str, section: str = ""
) -> str:
    """The first fault as one line: where, which key, which value, what is allowed."""
    fault = error.errors()[0]
    keys: list[str] = []
    node: Any = tree
    for part in fault["loc"]:  # pydantic puts the tags of unions between the keys; a tag leads nowhere in the tree
        if isinstance(node, Mapping) and (part in node or (fault["type"] == "missing" and part == fault["loc"][-1])):
            keys.append(str(part))
            node = node.get(part)
    if fault["type"] == "union_tag_invalid":
        keys.append(fault["ctx"]["discriminator"].strip("'"))
        node = node[keys[-1]]
    key = ".".join([section, *keys] if section else keys)
    where = _said_by(key, origins, file)
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "union_tag_invalid":
        return f"{where}: {key}: {node!r} is none of {fault['ctx']['expected_tags']}"
    if not key:
        return f"{where}: {message}"
    if fault["type"] == "extra_forbidden":
        return f"{where}: {key}: unknown key; {_nearest(keys, model)}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return f"{where}: {key}: missing; say it in the file or on the command line"
    shown = re.sub("://[^/@]*@", "://***@", repr(node))  # an error line ends in logs: no password in it
    return f"{where}: {key}: {shown}: {message}"


def _said_by(key: str, origins: Origins, file: str) -> str:
    """Who said the key, or the nearest section that it is in; `file` where nobody did."""
    ends = [len(key), *(i for i in range(len(key) - 1, -1, -1) if key[i] == ".")]
    return next((origins[key[:end]] for end in ends if key[:end] in origins), file)


def _section_fields(keys: Sequence[str], model: type[BaseModel]) -> set[str]:
    """The keys that the section holding `keys[-1]` may have, over all kinds that it may be of."""
    models = [model]
    for key in keys[:-1]:
        fields = [kind.model_fields[key] for kind in models if key in kind.model_fields]
        models = [kind for field in fields for kind in _models_in(field.annotation)]
    return {name for kind in models for name in kind.model_fields}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in getattr(annotation, "__args__", ()) for model in _models_in(part)]


def _nearest(keys: Sequence[str], model: type[BaseModel]) -> str:
    allowed = _section_fields(keys, model)
    if keys[-1] in allowed:
        return "another kind has it, this one does not"
    if not allowed:
        return "none is allowed here"
    close = difflib.get_close_matches(keys[-1], allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(allowed))}"
