"""Configuration of a stream from files and overrides: the part of loading that needs the methods.

Reading files and overrides is `config/loader.py`. Here the settings under `by_method` are applied for the
selected method, and its options are validated by the method's own model. Settings under `by_method` have the
priority of the file that contains them: files that extend it and the command line override them.

Code that these files and overrides name, as `package.module:Class`, is the user's own: it is recorded as trusted. The
resolved configuration of an artifact or a server, to which `override_config` applies, vouches for nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from avcil_dist.config.encoders import FUSIONS, PlugInEncoderConfig
from avcil_dist.config.loader import (
    BY_METHOD,
    COMMAND_LINE,
    SettingsTree,
    find_config,
    read_tree,
    settings_by_method,
)
from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.schema import Config, MethodConfig
from avcil_dist.config.section import Section
from avcil_dist.config.validation_errors import explain_error
from avcil_dist.errors import ConfigError
from avcil_dist.system.plugins import check_name, trust

NAMES_OF_CODE = ("method", "method.name", "model.visual.kind", "model.audio.kind", "model.fusion", "tracking.trackers")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Load and validate the configuration of a file or shipped name, with `section.key=value` overrides.

    Raises ConfigError, one line that names file, key, value and what is allowed.
    """
    tree = read_tree(find_config(name))
    trust(*_code_in(tree.values), *_code_in_overrides(overrides))
    selecting = [override for override in overrides if override.partition("=")[0] in ("method", "method.name")]
    for override in selecting:  # first, as they select the settings under `by_method`, which the others override
        tree.override(override)
    _apply_by_method(tree)
    for override in overrides:
        if override not in selecting:
            tree.override(override)
    return _validate(tree)


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return a resolved configuration with `section.key=value` overrides. Raises ConfigError as `load_config` does."""
    trust(*_code_in_overrides(overrides))
    tree = SettingsTree(COMMAND_LINE, config.model_dump(mode="json"))
    for override in overrides:
        tree.override(override)
    return _validate(tree)


def _code_in(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the texts of settings that may name code."""
    for key in NAMES_OF_CODE:
        node: Any = values
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        yield from (name for name in (node if isinstance(node, list) else [node]) if isinstance(name, str))
    by_method = values.get(BY_METHOD)
    yield from (name for name in by_method if isinstance(name, str)) if isinstance(by_method, Mapping) else ()


def _code_in_overrides(overrides: Sequence[str]) -> Iterator[str]:
    tree = SettingsTree(COMMAND_LINE)
    for override in overrides:
        tree.override(override)
    yield from _code_in(tree.values)


def _validate(tree: SettingsTree) -> Config:
    config = _with_encoder_options(tree.validate(Config), tree)
    if config.model.fusion not in FUSIONS:
        _check_plug_in_fusion(config.model.fusion, tree.source_of("model.fusion"))
    try:
        options_model = _method_options(config.method.name)
    except ConfigError as error:
        raise ConfigError(f"{tree.source_of('method.name')}: {error}") from None
    try:
        options = options_model.model_validate(config.method.model_extra)
    except ValidationError as error:
        line = explain_error(error, tree.values["method"], options_model, tree.source_of, section="method")
        raise ConfigError(line) from None
    return config.model_copy(update={"method": MethodConfig(name=config.method.name, **options.model_dump())})


def _with_encoder_options(config: Config, tree: SettingsTree) -> Config:
    """Return the configuration with the validated options of encoders that are plug-ins."""
    resolved = {}
    for modality, section in (("visual", config.model.visual), ("audio", config.model.audio)):
        if isinstance(section, PlugInEncoderConfig):
            key = f"model.{modality}"
            options = _encoder_options(modality, section.kind, tree.source_of(f"{key}.kind"))
            try:
                values = options.model_validate(section.model_extra)
            except ValidationError as error:
                given = tree.values["model"][modality]
                raise ConfigError(explain_error(error, given, options, tree.source_of, section=key)) from None
            resolved[modality] = PlugInEncoderConfig(kind=section.kind, **values.model_dump())
    if not resolved:
        return config
    # validated again: some checks of the whole concern the options of an encoder
    tree.values["model"] |= {modality: section.model_dump() for modality, section in resolved.items()}
    return tree.validate(Config)


def _method_options(name: str) -> type[Section]:
    """Return the model of a method's options. Raises ConfigError as `method_class` does."""
    if name in METHOD_OPTIONS:
        check_name("method.name", name, "methods", sorted(METHOD_OPTIONS))
        return METHOD_OPTIONS[name]
    from avcil_dist.methods import method_class  # imports torch

    return method_class(name).Options


def _encoder_options(modality: str, kind: str, source: str) -> type[Section]:
    from avcil_dist.models.encoders.build import audio_class, visual_class  # seconds of imports

    try:
        return (visual_class if modality == "visual" else audio_class)(kind).Options
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _check_plug_in_fusion(name: str, source: str) -> None:
    from avcil_dist.models.fusion import fusion_class

    try:
        fusion_class(name)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _apply_by_method(tree: SettingsTree) -> None:
    """Merge the settings of the selected method into the tree, and remove those of the others."""
    by_method = settings_by_method(tree)
    tree.values.pop(BY_METHOD, None)
    for name in by_method:
        try:
            _method_options(name)
        except ConfigError as error:
            raise ConfigError(f"{tree.file}: {BY_METHOD}: {error}") from None
    section = tree.values.get("method")
    selected = str(section.get("name")) if isinstance(section, dict) else ""
    source = tree.sources.get(f"{BY_METHOD}.{selected}", tree.file)
    tree.merge(by_method.get(selected, {}), f"{source} ({BY_METHOD}.{selected})")
