"""Fields of the schema as a flat list: key, type, default, description and class of change of each setting."""

import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from avcil_dist.config.schema import Config
from avcil_dist.config.section import ChangeClass, Section

TYPE_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false", type(None): "null"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}


@dataclass(frozen=True)
class SettingField:
    """One setting. `kind` names the alternative of its section that has it, such as an encoder or a method."""

    key: str
    kind: str | None
    type: str
    default: str | None  # as YAML; None for a required setting
    description: str
    change: ChangeClass


@cache
def schema_fields() -> tuple[SettingField, ...]:
    """Return all settings of the schema, in its order, without the options of the methods."""
    return tuple(_fields_of(Config, ""))


def method_fields(options: Mapping[str, type[Section]]) -> list[SettingField]:
    """Return the options of each method. A change of an option is a fork, unless its type has another class."""
    return [
        SettingField(
            f"method.{name}",
            method,
            type_text(field),
            default_text(field),
            field.description or "",
            next(iter(_marked_changes(field)), ChangeClass.FORK),
        )
        for method, model in options.items()
        for name, field in model.model_fields.items()
    ]


def keys_in(model: type[BaseModel]) -> list[str]:
    """Return the dotted keys of all settings of a model, over all kinds of each section."""
    keys: dict[str, None] = {}
    for name, field in model.model_fields.items():
        inner = [key for section in sections_in(field.annotation) for key in keys_in(section)]
        keys |= dict.fromkeys([f"{name}.{key}" for key in inner] or [name])
    return list(keys)


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a field's annotation allows; none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in sections_in(part)]


def kind_of(section: type[BaseModel]) -> str:
    """Return the kind that selects this section among its alternatives."""
    kinds = get_args(section.model_fields["kind"].annotation)
    return str(kinds[0]) if kinds else "plug-in"


def type_text(field: FieldInfo) -> str:
    """Return the type of a field in words, with its bounds."""
    return _type_text(field.annotation, field.metadata)


def default_text(field: FieldInfo) -> str | None:
    """Return the default of a field as one line of YAML; None for a required field."""
    if field.is_required():
        return None
    default = list(field.default) if isinstance(field.default, tuple) else field.default
    return yaml.safe_dump(default, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _fields_of(model: type[BaseModel], prefix: str, kind: str | None = None) -> Iterator[SettingField]:
    for name, field in model.model_fields.items():
        sections = sections_in(field.annotation)
        for section in sections:
            yield from _fields_of(section, f"{prefix}{name}.", kind_of(section) if len(sections) > 1 else kind)
        if not sections:
            yield SettingField(
                f"{prefix}{name}",
                kind,
                type_text(field),
                default_text(field),
                field.description or "",
                _change_of(f"{prefix}{name}", field),
            )


def _change_of(key: str, field: FieldInfo) -> ChangeClass:
    marked = _marked_changes(field)
    if len(marked) != 1:
        raise AssertionError(f"{key}: a field needs one class of change, such as Fork[...]; it has {len(marked)}")
    return marked[0]


def _marked_changes(field: FieldInfo) -> list[ChangeClass]:
    return [marker for marker in field.metadata if isinstance(marker, ChangeClass)]


def _type_text(annotation: Any, metadata: Sequence[Any]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(parts[0], parts[1:])
    if origin in (Union, types.UnionType):
        return " or ".join(_type_text(part, ()) for part in parts)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is list:
        return f"list of ({_type_text(parts[0], ())})"
    if origin is tuple:
        return f"[{', '.join(_type_text(part, ()) for part in parts)}]"
    bounds = [f"{sign} {getattr(marker, name)}" for name, sign in BOUNDS.items() for marker in metadata
              if getattr(marker, name, None) is not None]  # fmt: skip
    return " ".join([TYPE_NAMES[annotation], *bounds])
