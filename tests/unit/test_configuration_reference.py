"""Reference of the settings: complete, and the page in docs/ equals what the command prints."""

from pathlib import Path

from click.testing import CliRunner

from avcil_dist.compose import load_config
from avcil_dist.config.fields import schema_fields
from avcil_dist.config.method_options import METHOD_OPTIONS
from avcil_dist.config.reference import all_fields, markdown_reference, text_reference
from avcil_dist.config.serialization import flatten
from launch.cli.main import cli

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_command_prints() -> None:
    printed = CliRunner().invoke(cli, ["config", "keys", "--markdown"])
    assert printed.output == markdown_reference(METHOD_OPTIONS)
    regenerate = "make it again: avcil config keys --markdown > docs/configuration.md"
    assert PAGE.read_text() == printed.output, regenerate


def test_the_command_prints_every_key_of_a_configuration() -> None:
    printed = CliRunner().invoke(cli, ["config", "keys"]).output
    assert printed == text_reference(METHOD_OPTIONS)
    keys = {line.split(":")[0].split(" (")[0] for line in printed.splitlines() if not line.startswith(" ")}
    assert keys >= set(flatten(load_config("demo")))


def test_options_of_methods_come_after_the_name_of_the_method() -> None:
    keys = [field.key for field in all_fields(METHOD_OPTIONS)]
    first = keys.index("method.name")
    assert keys[first + 1].startswith("method.")
    assert {field.key for field in schema_fields()} <= set(keys)


def test_a_field_shows_its_type_bounds_default_and_kind() -> None:
    by_key = {(field.key, field.kind): field for field in schema_fields()}
    assert by_key["optim.layer_decay", None].type == "number > 0 ≤ 1"
    assert by_key["optim.layer_decay", None].default == "1.0"
    assert by_key["data.manifest", None].default is None
    assert by_key["scenario.classes_per_step", None].type == "integer > 0 or list of (integer > 0)"
    assert by_key["model.visual.depth", "videomae"].default == "12"
    assert by_key["model.audio.dim", "small"].default == "64"
