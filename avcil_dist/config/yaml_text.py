"""YAML with bounds: plain values from a text of limited size, depth and number of nodes.

A small text can stand for a huge value (aliases of aliases, merge keys) or for an odd one (dates, base-60 numbers).
Accepted are mappings, lists, text, integers, numbers, truth values and null; `parse_yaml` raises for everything else.
"""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 32
MAX_NODES = 50_000  # with each alias counted as often as it is named
KINDS = ("null", "bool", "int", "float", "str", "seq", "map")
BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-9_.]+)+")


class _Loader(yaml.SafeLoader):
    """Loader of plain values. Its faults are YAMLErrors."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node. Raises ComposerError below MAX_DEPTH, which also bounds the recursion of what follows."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_document(self) -> yaml.Node | None:
        """Compose the document and count its nodes. Raises ComposerError for too many, and for a value in itself."""
        node = super().compose_document()
        if node is not None and _num_nodes(node, {}) > MAX_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_NODES} values", node.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node. Raises ConstructorError where the text is no value of its tag."""
        if isinstance(node, yaml.ScalarNode) and BASE_60.fullmatch(node.value):
            return node.value  # YAML 1.1 reads 1:30 as 90
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, OverflowError):
            shown = str(node.value)[:50]
            raise yaml.constructor.ConstructorError(None, None, f"{shown!r} is no value", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping. Raises ConstructorError for a key that is given twice, or is neither text nor a number."""
        seen: set[str | int] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int):
                raise yaml.constructor.ConstructorError(None, None, "a key is a word", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Leave `<<` alone: merges of merges double a mapping each time."""


# without dates, sets, binary data and merge keys; `=` and `<<` are plain text
_Loader.yaml_constructors = {
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in KINDS
}
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in KINDS]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """Return the plain value of a YAML text. Raises yaml.YAMLError for any other text, and beyond the bounds."""
    if len(text) > MAX_CHARACTERS:
        raise yaml.YAMLError(f"{len(text)} characters, at most {MAX_CHARACTERS} are read")
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _num_nodes(node: yaml.Node, counted: dict[int, int]) -> int:
    """Return the number of nodes below and with `node`. `counted` has those of the nodes before; 0 is in progress."""
    if id(node) in counted:
        if not counted[id(node)]:
            raise yaml.composer.ComposerError(None, None, "a value contains itself", node.start_mark)
        return counted[id(node)]
    counted[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        inner = [part for pair in node.value for part in pair]
    else:
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
    counted[id(node)] = 1 + sum(_num_nodes(part, counted) for part in inner)
    return counted[id(node)]
