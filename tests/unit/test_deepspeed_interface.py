"""What this program uses of DeepSpeed beyond its documented interface is in one file, with the reason for each."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

PROJECT = Path(__file__).parents[2]
FILE = PROJECT / "avcil_dist" / "training" / "deepspeed_private.py"
SOURCES = sorted(
    path for folder in ("avcil_dist", "data_shards", "launch") for path in (PROJECT / folder).rglob("*.py")
)
# Names of DeepSpeed's objects in this program: an attribute of one that begins with `_` is private.
OBJECTS = {
    "engine",
    "_engine",
    "optimizer",
    "_optimizer",
    "zero",
    "parameter",
    "param",
    "module",
    "deepspeed",
    "mapping",
}
DOCUMENTED = {"deepspeed", "deepspeed.accelerator", "deepspeed.utils", "deepspeed.zero"}


def names_of(function: ast.FunctionDef) -> set[str]:
    """The names that a function's docstring lists."""
    text = ast.get_docstring(function) or ""
    listed = re.search(r"Names?: (.*)", text, re.DOTALL)
    return set(re.findall(r"`(\w+)`", listed[1])) if listed else set()


FUNCTIONS = [node for node in ast.parse(FILE.read_text()).body if isinstance(node, ast.FunctionDef)]
PRIVATE = set().union(*map(names_of, FUNCTIONS))


def private_uses(path: Path) -> set[str]:
    """Attributes, words and imports of a file that are private to DeepSpeed."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
            hidden = node.attr.startswith("_") and owner in OBJECTS
            if hidden or node.attr in PRIVATE or node.attr.startswith("ds_"):
                found.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            found |= {argument.value for argument in node.args[1:2] if getattr(argument, "value", None) in PRIVATE}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            found |= {str(node.module)} - DOCUMENTED
    return found


@pytest.mark.parametrize("path", [path for path in SOURCES if path != FILE], ids=lambda path: str(path.name))
def test_no_other_file_uses_what_is_private_to_deepspeed(path: Path) -> None:
    assert not private_uses(path)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_each_use_has_its_reason_and_its_names(function: ast.FunctionDef) -> None:
    text = ast.get_docstring(function) or ""
    assert "Reason: " in text
    assert names_of(function)
    code = ast.unparse(ast.Module(function.body[1:], []))
    assert all(re.search(rf"\b{name}\b", code) for name in names_of(function))


def test_the_check_finds_a_private_use(tmp_path: Path) -> None:
    source = tmp_path / "source.py"
    source.write_text(
        "from deepspeed.runtime.zero.stage3 import X\n"
        "a = self._engine._config\nb = engine.optimizer.bit16_groups\nc = getattr(value, 'ds_id')\nd = value.ds_shape\n"
    )
    assert private_uses(source) == {"deepspeed.runtime.zero.stage3", "_config", "bit16_groups", "ds_id", "ds_shape"}
