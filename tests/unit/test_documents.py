"""The documents beside the code: commands, settings, files, functions and links that they name exist."""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

import avcil_dist
from avcil_dist.config.fields import schema_fields
from avcil_dist.methods import method_class, method_names
from launch.cli.main import cli
from launch.cluster.resources import ClusterConfig
from tests.helpers.documents import DOCUMENTS, PROJECT, avcil_arguments, blocks, commands, inline_code, prose

SECTIONS = {field.key.split(".")[0] for field in schema_fields()}
SETTINGS = {field.key for field in schema_fields()}
GROUPS = {key.rpartition(".")[0] for key in SETTINGS if "." in key}
METHOD_OPTIONS = {f"method.{key}" for name in method_names() for key in method_class(name).Options.model_fields}
CLUSTER_SETTINGS = {f"cluster.{name}" for name in ClusterConfig.model_fields}
KNOWN = SETTINGS | GROUPS | METHOD_OPTIONS | CLUSTER_SETTINGS | {"method", "engine", "by_method"}
by_name = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


@by_name
def test_commands_and_their_options_exist(document: Path) -> None:
    faults = []
    for block in blocks(document):
        if block.language == "bash":
            for words in commands(block.text):
                arguments = avcil_arguments(words)
                if arguments is not None:
                    faults += command_faults(arguments)
    assert not faults


def command_faults(arguments: list[str]) -> list[str]:
    """Faults of one `avcil` command: an unknown command, option or setting, or a missing argument."""
    command: click.Command = cli
    context = click.Context(cli)
    rest = list(arguments)
    line = f"avcil {' '.join(arguments)}"
    while isinstance(command, click.Group):
        found = command.get_command(context, rest[0]) if rest else None
        if found is None:
            return [] if rest[:1] in ([], ["--help"], ["--version"]) else [f"{line}: no command {rest[0]!r}"]
        command, rest = found, rest[1:]
    try:
        values, left, _ = command.make_parser(click.Context(command)).parse_args(rest)
    except click.UsageError as error:
        return [f"{line}: {error.message}"]
    faults = [f"{line}: {word!r} is left over" for word in left]
    for parameter in command.params:
        value = values.get(parameter.name or "")
        is_given = isinstance(value, str | tuple | list) and bool(value)
        if isinstance(parameter, click.Argument) and parameter.required and not is_given:
            faults.append(f"{line}: {parameter.name} is missing")
    settings = [word for value in values.values() for word in (value if isinstance(value, tuple | list) else [value])]
    faults += [
        f"{line}: no setting {word.partition('=')[0]!r}"
        for word in settings
        if isinstance(word, str) and re.match(r"[a-z_.]+=", word) and word.partition("=")[0] not in KNOWN
    ]
    return faults


@by_name
def test_settings_in_the_text_exist(document: Path) -> None:
    keys = [re.match(r"([a-z]+(?:\.[a-z_]+)+)(?:=.*)?$", code) for code in inline_code(prose(document))]
    named = {match[1] for match in keys if match and match[1].split(".")[0] in SECTIONS | {"cluster"}}
    endings = (".yaml", ".json", ".safetensors", ".md", ".py")
    assert not {key for key in named if key not in KNOWN and not key.endswith(endings)}


@by_name
def test_settings_in_yaml_blocks_exist(document: Path) -> None:
    for block in blocks(document):
        if block.language == "yaml":
            content = yaml.safe_load(block.text)
            model = ClusterConfig if "kind" in content else None
            assert set(content) <= (set(ClusterConfig.model_fields) if model else SECTIONS | {"extends", "by_method"})
            if model:
                model.model_validate(content)
            else:
                assert not unknown_keys(content)


def unknown_keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    unknown = []
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in ("extends", "by_method"):
            continue
        if isinstance(value, dict) and key in GROUPS | {"method", "engine"}:
            unknown += unknown_keys(value, f"{key}.")
        elif key not in KNOWN:
            unknown.append(key)
    return unknown


@by_name
def test_files_and_functions_in_the_text_exist(document: Path) -> None:
    """A reference is a path, or `path.py:name` for a function, class, method or constant of a file."""
    faults = []
    for code in inline_code(prose(document)):
        match = re.fullmatch(r"((?:avcil_dist|data_shards|launch|configs|docs|tests)/[\w./-]*?)(?::([\w.]+))?", code)
        if match and "NAME" not in code:
            path, name = PROJECT / match[1], match[2]
            if not path.exists():
                faults.append(f"{code}: no such file")
            elif name and name.split(".")[-1] not in defined_names(path):
                faults.append(f"{code}: not defined there")
    assert not faults


def defined_names(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


@by_name
def test_links_lead_to_files_and_headings(document: Path) -> None:
    faults = []
    for target in re.findall(r"\]\(([^)\s]+)\)|<img[^>]+src=\"([^\"]+)\"", prose(document)):
        link = target[0] or target[1]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        linked = (document.parent / path) if path else document
        if not linked.exists():
            faults.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(linked):
            faults.append(f"{link}: no such heading")
    assert not faults


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@by_name
def test_examples_in_python_can_be_parsed(document: Path) -> None:
    for block in blocks(document):
        if block.language == "python":
            ast.parse(textwrap.dedent(block.text))


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    assert citation["version"] == avcil_dist.__version__
    assert f"## {avcil_dist.__version__} " in (PROJECT / "CHANGELOG.md").read_text()


def test_the_readme_is_short() -> None:
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 150


def test_a_fault_of_a_command_is_found() -> None:
    assert command_faults(["trian", "demo"])
    assert command_faults(["train"])
    assert command_faults(["train", "demo", "--nothing"])
    assert command_faults(["train", "demo", "optim.batch=3"])
    assert not command_faults(["train", "demo", "optim.lr=3e-4", "-n", "2"])
