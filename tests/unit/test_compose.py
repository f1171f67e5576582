from pathlib import Path

import pytest
import yaml

from avcil_dist.compose import load_config
from avcil_dist.config.loader import find_config, shipped_configs
from avcil_dist.config.schema import Config
from avcil_dist.config.serialization import config_from_yaml, config_to_yaml, flatten
from avcil_dist.errors import ConfigError

SHIPPED = shipped_configs()


def shipped(folder: str) -> list[str]:
    return sorted(path.stem for path in (SHIPPED / folder).glob("*.yaml"))


def write(folder: Path, text: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def refusal(name: str, *overrides: str) -> str:
    """The error line of a refused configuration."""
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides)
    line = str(caught.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", shipped("benchmark"))
def test_every_shipped_benchmark_is_valid(name: str) -> None:
    assert load_config(name).name == name
    assert load_config(str(SHIPPED / "benchmark" / f"{name}.yaml")) == load_config(name)


@pytest.mark.parametrize("name", shipped("method"))
def test_every_shipped_method_is_valid(name: str) -> None:
    assert load_config("demo", [f"method={name}"]).method.name == name


@pytest.mark.parametrize("name", shipped("engine"))
def test_every_shipped_engine_is_valid(name: str) -> None:
    settings = yaml.safe_load((SHIPPED / "engine" / f"{name}.yaml").read_text())
    engine = load_config("demo", [f"engine={name}"]).engine.model_dump()
    assert engine == engine | settings


def test_the_shipped_base_lacks_only_the_settings_that_a_benchmark_must_set(tmp_path: Path) -> None:
    assert "data: missing" in refusal("base", "name=x")
    required = "extends: base\nname: x\ndata: {manifest: m.json}\nscenario: {classes_per_step: 1}\n"
    models = "model: {visual: {kind: precomputed}, audio: {kind: precomputed}}\n"
    assert load_config(write(tmp_path, required + models)).method.name == "avcil"


def test_the_file_itself_wins_over_what_it_extends(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "extends: demo\nname: mine\noptim: {epochs: 3}\n"))
    demo = load_config("demo")
    assert (config.name, config.optim.epochs) == ("mine", 3)
    assert config.optim.global_batch == demo.optim.global_batch
    assert config.data == demo.data


def test_later_files_win_over_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\noptim: {epochs: 1, global_batch: 4}\n", "a.yaml")
    write(tmp_path, "seed: 2\noptim: {epochs: 2}\n", "deep/b.yaml")
    config = load_config(write(tmp_path, "extends: [demo, a.yaml, deep/b.yaml]\nseed: 3\n"))
    assert (config.seed, config.optim.epochs, config.optim.global_batch) == (3, 2, 4)


def test_extends_is_relative_to_the_file_that_contains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "extends: ../top.yaml\nseed: 5\n", "deep/middle.yaml")
    write(tmp_path, "extends: demo\nname: top\n", "top.yaml")
    path = write(tmp_path, "extends: deep/middle.yaml\n")
    monkeypatch.chdir("/")
    config = load_config(path)
    assert (config.name, config.seed) == ("top", 5)


def test_one_base_by_two_ways_is_no_circle(tmp_path: Path) -> None:
    write(tmp_path, "extends: demo\nseed: 1\n", "a.yaml")
    write(tmp_path, "extends: demo\nname: b\n", "b.yaml")
    config = load_config(write(tmp_path, "extends: [a.yaml, b.yaml]\n"))
    assert config.name == "b"


def test_a_circle_of_files_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "extends: mine.yaml\n", "other.yaml")
    line = refusal(write(tmp_path, "extends: other.yaml\n"))
    assert line.endswith("mine.yaml: extends itself, by way of other.yaml")


def test_a_section_of_one_word_replaces_the_whole_section(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: demo\nmethod: finetune\nengine: zero2\n")
    config = load_config(path)
    assert config.method.model_dump() == {"name": "finetune"}
    assert config.engine.zero_stage == 2
    assert load_config(path, ["method=avcil"]).method.model_dump()["lambda_class"] == 1.0


def test_a_section_of_some_keys_is_merged_with_the_method_extended(tmp_path: Path) -> None:
    options = load_config(write(tmp_path, "extends: demo\nmethod: {lambda_instance: 0.5}\n")).method.model_dump()
    assert (options["name"], options["lambda_instance"], options["lambda_class"]) == ("avcil", 0.5, 1.0)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-3", "optim.lr", 0.001),  # YAML 1.1 reads 1e-3 as text
        ("optim.lr=0.5", "optim.lr", 0.5),
        ("scenario.classes_per_step=[5, 3]", "scenario.classes_per_step", [5, 3]),
        ("scenario.classes_per_step=4", "scenario.classes_per_step", 4),
        ("scenario.classes=[dog, cat]", "scenario.classes", ["dog", "cat"]),
        ("scenario.classes=null", "scenario.classes", None),
        ("data.manifest=s3://bucket/a=b/m.json", "data.manifest", "s3://bucket/a=b/m.json"),
        ("data.clip.silent=silence", "data.clip.silent", "silence"),
        ("method.attention=false", "method.attention", False),
        ("tracking.uri=http://host:5000", "tracking.uri", "http://host:5000"),
    ],
)
def test_a_word_on_the_command_line_wins(override: str, key: str, value: object) -> None:
    assert flatten(load_config("demo", [override]))[key] == value


def test_later_words_win() -> None:
    assert load_config("demo", ["seed=1", "seed=2"]).seed == 2
    assert load_config("demo", ["method=finetune", "method=avcil", "method.lambda_class=3"]).method.model_dump()[
        "lambda_class"
    ] == pytest.approx(3)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lrr=3", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("optin.lr=3", "optin: unknown key; did you mean 'optim'?"),
        ("epochs=3", "epochs: unknown key; did you mean 'optim.epochs'?"),
        ("size=3", "size: unknown key; allowed: data, engine, "),
        ("data.clip.zzz=3", "data.clip.zzz: unknown key; allowed: frames, mel_bins, mel_frames, mel_mean, "),
        ("model.visual.dimm=3", "model.visual.dimm: unknown key; did you mean 'dim'?"),
        ("model.audio.train=full", "model.audio.train: unknown key; another kind has it, this one does not"),
        ("optim.lr=fast", "optim.lr: 'fast': Input should be a valid number"),
        ("optim.epochs=2.5", "optim.epochs: 2.5: Input should be a valid integer"),
        ("optim=3", "optim: 3: Input should be a valid dictionary"),
        ("output=null", "output: None: Input should be a valid string"),
        ("optim.lr=-1", "optim.lr: -1: Input should be greater than 0"),
        ("scenario.classes_per_step=0", "scenario.classes_per_step: 0: Input should be greater than 0"),
        ("engine.zero_stage=4", "engine.zero_stage: 4: Input should be 0, 1, 2 or 3"),
        ("name=a/b", "name: 'a/b': String should match pattern"),
        ("model.visual.kind=resnet", "model.visual.kind: 'resnet' is none of precomputed, small, videomae"),
        ("model.visual={}", "model.visual: missing; set it in the file or on the command line"),
        ("method=icarl9", "method: 'icarl9' is none of "),
        ("method.name=icarl9", "method.name: 'icarl9' is none of "),
        ("engine=zero9", "engine: 'zero9' is none of zero0, zero0_bf16, zero1, "),
        ("method.lambda_clas=3", "method.lambda_clas: unknown key; did you mean 'lambda_class'?"),
        ("method.lambda_class=-3", "method.lambda_class: -3: Input should be greater than or equal to 0"),
        ("method.variant=mine", "method.variant: 'mine': Input should be 'released' or 'paper'"),
        ("seed", "'seed' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form section.key=value"),
        ("optim.=3", "'optim.=3' is not of the form section.key=value"),
        ("optim..lr=3", "'optim..lr=3' is not of the form section.key=value"),
        ("optim.lr.x=3", "optim.lr.x: 'lr' is a value, not a section"),
    ],
)
def test_a_wrong_word_is_refused_in_one_line(override: str, line: str) -> None:
    assert refusal("demo", override).startswith(f"command line: {line}")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim: {lrr: 3}", "optim.lrr: unknown key; did you mean 'lr'?"),
        ("optim: {lr: fast}", "optim.lr: 'fast': Input should be a valid number"),
        ("memory: {size: -1}", "memory.size: -1: Input should be greater than or equal to 0"),
        ("memory:", "memory: None: Input should be a valid dictionary"),
        ("method: icarl9", "method: 'icarl9' is none of "),
        ("method: {name: icarl9}", "method.name: 'icarl9' is none of "),
        ("method: {lambda_clas: 1}", "method.lambda_clas: unknown key; did you mean 'lambda_class'?"),
        ("model: {visual: {kind: resnet}}", "model.visual.kind: 'resnet' is none of precomputed, "),
        ("1: 2", "1: 2: Keys should be strings"),
    ],
)
def test_a_wrong_value_in_a_file_is_refused_in_one_line(tmp_path: Path, text: str, line: str) -> None:
    assert refusal(write(tmp_path, f"extends: demo\n{text}\n")).startswith(f"mine.yaml: {line}")


def test_an_option_of_a_method_without_options_is_refused() -> None:
    line = refusal("demo", "method=finetune", "method.lambda_class=1")
    assert line == "command line: method.lambda_class: unknown key; none is allowed here"


def test_the_file_that_set_a_value_is_named_not_the_one_that_extends_it(tmp_path: Path) -> None:
    write(tmp_path, "extends: demo\noptim: {epochs: 0}\n", "below.yaml")
    assert refusal(write(tmp_path, "extends: below.yaml\noptim: {global_batch: 8}\n")).startswith(
        "below.yaml: optim.epochs: 0"
    )


def test_a_missing_required_key_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: base\nname: x\ndata: {window: 3}\n")
    assert refusal(path) == "mine.yaml: data.manifest: missing; set it in the file or on the command line"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [\n", "mine.yaml: not valid YAML: "),
        ("- a\n", "mine.yaml: a configuration is a mapping of sections, this is list"),
        ("", "mine.yaml: a configuration is a mapping of sections, this is NoneType"),
        ("extends: 3\n", "mine.yaml: extends: 3 is neither a file nor a list of files"),
        ("extends:\n", "mine.yaml: extends: None is neither a file nor a list of files"),
        ("extends: [demo, [x]]\n", "mine.yaml: extends: ['demo', ['x']] is neither a file nor a list of files"),
        ("extends: gone.yaml\n", "mine.yaml: extends: gone.yaml: no such file, and no benchmark of that name"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, text: str, line: str) -> None:
    assert refusal(write(tmp_path, text)).startswith(f"{tmp_path}/{line}")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00")
    assert refusal(f"{tmp_path}/mine.yaml").startswith(f"{tmp_path}/mine.yaml: not valid YAML: ")


def test_a_missing_file_lists_the_shipped_benchmarks() -> None:
    line = refusal("vs1000")
    assert line.startswith("vs1000: no such file, and no benchmark of that name (there are: ")
    assert "demo" in line
    assert find_config("demo").name == "demo.yaml"


def test_a_password_in_the_tracking_uri_is_refused_and_not_repeated(tmp_path: Path) -> None:
    path = write(tmp_path, "extends: demo\ntracking: {uri: 'postgresql://me:hunter2@host/db'}\n")
    for line in (refusal(path), refusal("demo", "tracking.uri=postgresql://me:hunter2@host/db")):
        assert "tracking.uri: 'postgresql://***@host/db': no user or password here; set MLFLOW_TRACKING_" in line
        assert "hunter2" not in line


def test_sections_in_conflict_are_refused() -> None:
    line = refusal("demo", "data.canonical_nodes=3")
    assert line.startswith("demo.yaml: optim.global_batch=16 is not a multiple of data.canonical_nodes=3")
    line = refusal("demo", "model.visual={kind: precomputed}")
    assert line == "demo.yaml: model.visual and model.audio: both are precomputed, or neither"


@pytest.mark.parametrize("name", shipped("benchmark"))
def test_a_resolved_configuration_comes_back_from_its_yaml(name: str) -> None:
    config = load_config(name, ["output=out/ü", "scenario.classes=[bird, 'no']"])
    again = config_from_yaml(config_to_yaml(config))
    assert again == config
    assert flatten(again) == flatten(config)


def test_the_resolved_yaml_contains_the_defaults_of_the_method() -> None:
    document = yaml.safe_load(config_to_yaml(load_config("demo")))
    assert document["method"]["contrast_temperature"] == 0.05
    assert next(iter(document)) == "name"


@pytest.mark.parametrize("text", ["a: [", "[]", "name: x"])
def test_a_text_that_is_no_resolved_configuration_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^not a resolved configuration: ") as caught:
        config_from_yaml(text)
    assert "\n" not in str(caught.value)


def test_flatten_gives_every_value_by_its_dotted_key() -> None:
    config = load_config("demo", ["scenario.classes_per_step=[2, 6]"])
    flat = flatten(config)
    assert flat["scenario.classes_per_step"] == [2, 6]
    assert flat["data.clip.frames"] == 4
    assert flat["method.name"] == "avcil"
    assert not any(isinstance(value, dict) for value in flat.values())


def test_a_configuration_cannot_be_changed() -> None:
    config = load_config("demo")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]
    assert isinstance(config, Config)


def test_a_named_section_cannot_lead_out_of_its_folder() -> None:
    with pytest.raises(ConfigError, match="is none of"):
        load_config("demo", ["method=../engine/zero1"])


@pytest.mark.parametrize("name", ["run #1", "#1", "a#b"])
def test_a_word_of_the_command_line_has_no_comment(name: str) -> None:
    assert load_config("demo", [f"output={name}"]).output == name
    assert load_config("demo", [f"output='{name}'  # as in a file"]).output == name
