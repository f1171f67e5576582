"""Hostile or mistaken settings: one line, whatever the text, the number or the file."""

import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from avcil_dist.compose import load_config
from avcil_dist.config.fields import schema_fields
from avcil_dist.config.loader import is_file
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml
from avcil_dist.config.yaml_text import MAX_CHARACTERS, parse_yaml
from avcil_dist.errors import AvcilError, ConfigError
from launch.cluster.resources import load_cluster

ALIASES = "a: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(AvcilError) as caught:
        load_config(name, overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 1000
    return str(caught.value)


TEXTS = [field.key for field in schema_fields() if field.type.startswith("text") and field.kind is None]


@pytest.mark.parametrize("key", TEXTS)
@pytest.mark.parametrize(
    "text", [r"runs\n touch x #", r"a\tb", r"a\0b", r"a\e[2J", r"a\x85b", r"a\u2028b", r"a\ud800b"]
)
def test_no_text_has_control_characters(key: str, text: str) -> None:
    assert f"{key}: " in refusal("demo", f'{key}="{text}"')


def test_no_text_of_a_list_or_a_method_has_control_characters() -> None:
    assert "scenario.classes" in refusal("demo", r'scenario.classes=["dog", "a\nb"]')
    assert "method.name" in refusal("demo", r'method={name: "avcil\n"}')


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("tracking.uri", "postgresql://h/d?user=u&password=hunter2"),
        ("tracking.uri", "https://host/x?token=hunter2"),
        ("data.manifest", "s3://KEY:hunter2@bucket/m.json"),
        ("data.manifest", "s3://bucket/m.json?X-Amz-Signature=hunter2"),
        ("output", "s3://b/x?sig=hunter2"),
        ("snapshot.folder", "gs://u:hunter2@b/x"),
        ("tracking.artifact_uri", "az://c/x?sig=hunter2"),
        ("tracking.experiment", "https://u:hunter2@host"),
    ],
)
def test_a_secret_in_any_setting_is_refused_and_not_repeated(key: str, url: str) -> None:
    line = refusal("demo", f"{key}={url}")
    assert f"command line: {key}: " in line
    assert "hunter2" not in line


@pytest.mark.parametrize("key", ["output", "data.manifest", "snapshot.folder", "tracking.artifact_uri"])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("reference://k::http://h/e.json", "refused"),
        ("http://h/x", "not allowed"),
        ("pipe:cat x", "refused"),
        ("''", "empty"),
    ],
)
def test_a_path_has_an_allowed_protocol(key: str, url: str, message: str) -> None:
    assert message in refusal("demo", f"{key}={url}")


def test_an_empty_shard_cache_is_refused() -> None:
    assert "data.shard_cache: '': an empty path" in refusal("demo", "data.shard_cache=''")


def test_the_home_folder_is_expanded_once_in_every_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("extends: demo\nseed: 7\n")
    (tmp_path / "mine.yaml").write_text(
        "extends: ~/base.yaml\noutput: ~/runs\ndata: {manifest: ~/m.json, shard_cache: ~/c}\nsnapshot: {folder: ~/s}\n"
        "tracking: {artifact_uri: ~}\n"
    )
    config = load_config(f"{tmp_path}/mine.yaml", ["model.visual={kind: videomae, weights: ~/w}"])
    assert config.seed == 7
    assert config.output == f"{tmp_path}/runs"
    assert config.data.manifest == f"{tmp_path}/m.json"
    assert config.data.shard_cache == f"{tmp_path}/c"
    assert config.snapshot.folder == f"{tmp_path}/s"
    assert config.tracking.artifact_uri is None  # YAML's null
    assert config.model.visual.weights == f"{tmp_path}/w"  # type: ignore[union-attr]
    assert load_config("demo", ["output=a/~/b"]).output == "a/~/b"
    monkeypatch.setenv("HOME", "/elsewhere")
    assert config_from_yaml(config_to_yaml(config)) == config


NUMBERS = [field.key for field in schema_fields() if field.type.startswith(("number", "integer")) and not field.kind]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan", "1e400", "9" * 30, "-" + "9" * 30, "9" * 5000])
def test_a_number_is_finite_and_bounded(key: str, value: str) -> None:
    refusal("demo", f"{key}={value}")


@pytest.mark.parametrize(
    "word",
    ["data.clip.size=100000000", "data.decode_workers=3000", "engine.timeout_minutes=1e15", "method.lambda_class=1e300",
     "seed=2024-13-45", "seed=!!int abc", "seed=!!int ''", "seed=!!bool x", "optim.epochs=1:30", "name=" + "x" * 5000,
     "output=" + "x" * 5000, "name=[" + "[" * 1500, "seed=&a [*a]", "seed={a: 1, a: 2}", "x" * 200 + "=1"],
)  # fmt: skip
def test_an_odd_word_is_refused_in_one_line(word: str) -> None:
    refusal("demo", word)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (ALIASES, "more than 50000 values"),
        ("a: &a [*a]", "a value contains itself"),
        ("a: " + "[" * 1500 + "]" * 1500, "more than 32 levels"),
        ("seed: 1\nseed: 2", "'seed' is given twice"),
        ("optim: {lr: 1, lr: 2}", "'lr' is given twice"),
        ("seed: !!int abc", "'abc' is no value"),
        ("seed: !!bool maybe", "'maybe' is no value"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: !!set {a}", "could not determine a constructor"),
        ("seed: " + "9" * 5000, "is no value"),
        ("? [a]\n: 1", "a key is a word"),
        ("null: 1", "a key is a word"),
        ("#" * (MAX_CHARACTERS + 1), "at most 262144 are read"),
        ("seed: 1\n---\nseed: 2", "single document"),
        ("seed: \x07", "special characters are not allowed"),
    ],
)
def test_a_hostile_yaml_file_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    line = refusal(f"{tmp_path}/mine.yaml")
    assert line.startswith(f"{tmp_path}/mine.yaml: not valid YAML: ")
    assert reason in line
    with pytest.raises(ConfigError, match="not a resolved configuration"):
        config_from_yaml(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: 1:30", {"a": "1:30"}),
        ("a: 2024-13-45", {"a": "2024-13-45"}),
        ("a: &x [1]\nb: *x", {"a": [1], "b": [1]}),
        ("\ufeffa: 1", {"a": 1}),
        ("a: &x {b: 1}\nc: {<<: *x}", {"a": {"b": 1}, "c": {"<<": {"b": 1}}}),
        ("3: {a: [1, 2.5, true, null, x]}", {3: {"a": [1, 2.5, True, None, "x"]}}),
    ],
)
def test_plain_values(text: str, value: object) -> None:
    assert parse_yaml(text) == value


@settings(deadline=None, max_examples=150)
@given(st.text(alphabet="{}[]&*!?:-,'\"|>%@#a1 \n\t.~=<", max_size=60))
def test_any_text_is_a_value_or_a_fault_of_yaml(text: str) -> None:
    started = time.process_time()
    with suppress(yaml.YAMLError):
        parse_yaml(text)
    assert time.process_time() - started < 2


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    assert "a folder" in refusal(str(tmp_path))
    assert "too long" in refusal("x" * 5000)
    assert "no such file" in refusal("a\0b")
    (tmp_path / "latin.yaml").write_bytes("name: é\n".encode("latin-1"))
    assert "latin.yaml: not valid YAML: 'utf-8' codec" in refusal(f"{tmp_path}/latin.yaml")
    (tmp_path / "mine.yaml").write_text("extends: ..\n")
    assert f"{tmp_path}/mine.yaml: extends: ..: a folder" in refusal(f"{tmp_path}/mine.yaml")
    (tmp_path / "long.yaml").write_text(f"extends: {'x' * 5000}\n")
    assert "too long" in refusal(f"{tmp_path}/long.yaml")
    os.mkfifo(tmp_path / "pipe")
    assert "no such file" in refusal(f"{tmp_path}/pipe")
    assert not is_file(tmp_path / "pipe")


def test_no_permission_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\n")

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("avcil_dist.storage.local.os.open", refuse)  # root may read everything
    with pytest.raises(ConfigError, match=r"mine\.yaml: cannot be read \(Permission denied\)"):
        load_config(str(path))


def test_a_cluster_file_has_the_same_bounds_and_its_shell_lines_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for word in (r'partition="gpu\ntouch x"', r'extra={"a\nb": x}', r'extra={a: "x\ny"}', "hours=.inf", "hours=1e9"):
        with pytest.raises(ConfigError, match=f"command line: {word.split('=')[0]}[:.]") as caught:
            load_cluster("slurm", [word])
        assert len(str(caught.value).splitlines()) == 1
    shell = "export A=1\n\texport TOKEN=x"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"kind": "slurm", "setup": [shell], "folder": "~/jobs"}))
    cluster = load_cluster(f"{tmp_path}/c.yaml")
    assert cluster.setup == [shell]
    assert cluster.folder == f"{tmp_path}/jobs"
