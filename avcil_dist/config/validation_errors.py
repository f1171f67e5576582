"""Validation errors of pydantic as one line: source, key, value and what is valid."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from avcil_dist.config.fields import keys_in, sections_in

MAX_SHOWN = 200  # characters of a refused value


def explain_error(
    error: ValidationError,
    values: Mapping[str, Any],
    model: type[BaseModel],
    source_of: Callable[[str], str],
    section: str = "",
) -> str:
    """Return the first fault of `values` as one line. `source_of` maps a dotted key to the file that set it.

    `section` is the dotted key of `values` in the whole configuration.
    """
    fault = error.errors()[0]
    keys: list[str] = []
    node: Any = values
    for part in fault["loc"]:  # pydantic puts the tags of unions between the keys; the values have no such key
        if isinstance(node, Mapping) and (part in node or (fault["type"] == "missing" and part == fault["loc"][-1])):
            keys.append(str(part))
            node = node.get(part)
    if fault["type"] == "union_tag_invalid":
        keys.append(fault["ctx"]["discriminator"].strip("'"))
        node = node[keys[-1]]
    key = ".".join([section, *keys] if section else keys)
    source = source_of(key)
    key = key if key.isprintable() else repr(key)[1:-1]  # one line, whatever the keys of a mapping are
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "union_tag_invalid":
        return f"{source}: {key}: {_shown(node)} is none of {fault['ctx']['expected_tags']}"
    if not key:
        return f"{source}: {message}"
    if fault["type"] == "extra_forbidden":
        return f"{source}: {key}: unknown key; {_nearest_key(keys, model)}"
    if fault["type"] in ("missing", "union_tag_not_found"):
        return f"{source}: {key}: missing; set it in the file or on the command line"
    return f"{source}: {key}: {_shown(node)}: {message}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN // 2]} … {text[-MAX_SHOWN // 2 :]}"


def _nearest_key(keys: Sequence[str], model: type[BaseModel]) -> str:
    allowed = _keys_of_section(keys, model)
    if keys[-1] in allowed:
        return "another kind has it, this one does not"
    if not allowed:
        return "none is allowed here"
    if len(found := [key for key in keys_in(model) if key.rpartition(".")[2] == keys[-1]]) == 1:
        return f"did you mean {found[0]!r}?"
    close = difflib.get_close_matches(keys[-1], allowed, n=1)
    return f"did you mean {close[0]!r}?" if close else f"allowed: {', '.join(sorted(allowed))}"


def _keys_of_section(keys: Sequence[str], model: type[BaseModel]) -> set[str]:
    """Return the keys of the section that contains `keys[-1]`, over all kinds of that section."""
    models = [model]
    for key in keys[:-1]:
        fields = [kind.model_fields[key] for kind in models if key in kind.model_fields]
        models = [kind for field in fields for kind in sections_in(field.annotation)]
    return {name for kind in models for name in kind.model_fields}
