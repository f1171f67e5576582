"""Every method end to end: the same result on one process, on two, and interrupted between steps."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from avcil_dist.compose import load_config
from avcil_dist.config.schema import Config
from avcil_dist.data.arrival import arrived
from avcil_dist.data.manifest import load_manifest
from avcil_dist.methods import method_names
from avcil_dist.scenario import configured_scenario
from avcil_dist.streams.artifact import StepArtifact, load_artifact
from tests.helpers.ranks import run_ranks
from tests.helpers.streams import check_same_metrics, run_streams, write_config

VARIANTS = {
    "finetune": [],
    "joint": [],
    "lwf": [],
    "ssil": [],
    "avcil": [],
    "icarl": [],
    "afc": [],
    "analytic": [],
    "analytic validation": ["method.gamma=validation", "method.unit_length=false"],
    "er": [],
    "derpp": [],
    "derpp stored": ["method.logits=stored"],
    "er foreign": ["method=tests.helpers.foreign_methods:BalancedReplay"],
    "finetune foreign prompts": ["method=tests.helpers.foreign_methods:LearningToPrompt"],
    "wa": [],
    "bic": [],
    "memo": [],
    "foster": [],
    "foster audio": ["model.modality=audio"],
    "memo concat frozen": ["model.fusion=concat", "method.train_shared=false"],
    "anchored": ["method.parts=1"],
    "anchored audio": ["model.modality=audio", "optim.keep_epoch=last"],
    "er blurred": ["scenario.blur=0.3", "scenario.imbalance=2"],
    "wa blurred": ["scenario.blur=0.3"],
    "joint blurred": ["scenario.blur=0.3"],
    "kernel blurred": ["scenario.blur=0.3", "scenario.imbalance=2"],
    "kernel": [],
    "kernel factor": ["method.keep_factor=true"],
    "kernel landmarks": ["method.max_clips=80", "method.landmarks=30"],
    "ncm": [],
    "slda": [],
    "ranpac": ["method.expansion=40"],
    "acil": ["method.expansion=40"],
    "air": ["method.expansion=40"],
    "avcil paper": ["method.variant=paper"],
    "icarl fc paper": ["method.predict=fc", "method.variant=paper"],
    "afc lsc": ["method.predict=lsc"],
    "analytic network expanded": ["method.features=network", "method.expansion=40", "method.gamma=validation"],
    "avcil concat": ["model.fusion=concat"],
    "finetune concat visual": ["model.fusion=concat", "model.modality=visual"],
    "finetune audio": ["model.modality=audio"],
    "ssil herding audio": ["model.modality=audio", "memory.selection=herding"],
    "icarl random visual": ["model.modality=visual", "memory.selection=random"],
    "afc visual": ["model.modality=visual"],
    "analytic visual": ["model.modality=visual"],
    "avcil visual": ["model.modality=visual", *(f"method.{p}=false" for p in ("instance", "class_aware", "attention"))],
}
# Adam divides by the size of the gradient: where that is near zero, rounding errors become steps of the order of the
# learning rate, and a small one keeps them below the tolerance. A step of one class comes first: later, a softmax over
# new classes alone would have nothing to choose from, and all of its gradient would be rounding errors.
WITH_MEMORY = ("avcil", "ssil", "icarl", "afc", "er", "derpp", "wa", "bic", "memo", "foster", "anchored")
SIZES = (1, 2, 3)
FIRST_PART = 2


class Three(NamedTuple):
    one: str
    two: str
    interrupted: str


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Three]:
    """Each variant's stream on one process, on two, and on one that another replaces after two steps."""
    folder = tmp_path_factory.mktemp("methods")
    optim = {"epochs": 3, "global_batch": 12, "global_replay_batch": 6, "global_eval_batch": 16, "lr": 3e-4}
    path = write_config(folder, optim=optim, scenario={"classes_per_step": list(SIZES)})
    rest = range(FIRST_PART, len(SIZES))
    [one] = run_ranks(run_streams, 1, configs(path, folder / "one"))
    two, _ = run_ranks(run_streams, 2, configs(path, folder / "two"))
    run_ranks(run_streams, 1, configs(path, folder / "interrupted"), range(FIRST_PART))
    [interrupted] = run_ranks(run_streams, 1, configs(path, folder / "interrupted"), rest)
    return dict(zip(VARIANTS, map(Three, one, two, interrupted), strict=True))


def configs(path: Path, output: Path) -> list[Config]:
    return [
        load_config(str(path), [f"method={name.split()[0]}", f"output={output}/{name.replace(' ', '_')}", *words])
        for name, words in VARIANTS.items()
    ]


def last(stream: str) -> StepArtifact:
    return load_artifact(stream, len(SIZES) - 1)


def test_every_method_is_covered() -> None:
    assert {name.split()[0] for name in VARIANTS} == set(method_names())


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_give_the_result_of_one(streams: dict[str, Three], name: str) -> None:
    one, two = last(streams[name].one), last(streams[name].two)
    assert two.memory == one.memory
    check_same_metrics(two.metrics, one.metrics)
    assert two.model.keys() == one.model.keys()
    for key, weight in one.model.items():
        torch.testing.assert_close(
            two.model[key], weight, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert two.method.keys() == one.method.keys()
    for key, value in one.method.items():
        torch.testing.assert_close(two.method[key], value, rtol=1e-5, atol=1e-5, equal_nan=True)
    check_same_logits(two, one, tolerance=1e-4)


def check_same_logits(found: StepArtifact, expected: StepArtifact, *, tolerance: float) -> None:
    """Check the logits that are stored with exemplars, of the methods that have them."""
    if expected.exemplar_logits is None:
        assert found.exemplar_logits is None
        return
    assert found.exemplar_logits is not None
    assert torch.equal(found.exemplar_logits.counts, expected.exemplar_logits.counts)
    torch.testing.assert_close(
        found.exemplar_logits.values, expected.exemplar_logits.values, rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stream_interrupted_between_steps_gives_the_same_bits(streams: dict[str, Three], name: str) -> None:
    whole, resumed = last(streams[name].one), last(streams[name].interrupted)
    assert (resumed.memory, resumed.metrics) == (whole.memory, whole.metrics)
    for key, weight in whole.model.items():
        assert torch.equal(resumed.model[key], weight), key
    for key, value in whole.method.items():
        torch.testing.assert_close(resumed.method[key], value, rtol=0, atol=0, equal_nan=True)
    check_same_logits(resumed, whole, tolerance=0)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.split()[0] in WITH_MEMORY])
def test_memory_holds_an_equal_part_of_each_class(streams: dict[str, Three], name: str) -> None:
    memory = last(streams[name].two).memory
    assert {label: len(keys) for label, keys in memory.keys.items()} == {f"class_{n:03d}": 5 for n in range(6)}


@pytest.mark.parametrize("name", ["finetune", "joint", "lwf", "analytic"])
def test_methods_without_memory_keep_no_exemplars(streams: dict[str, Three], name: str) -> None:
    assert last(streams[name].one).memory.count == 0


@pytest.mark.parametrize("name", ["derpp stored", "er foreign"])
def test_exemplars_keep_the_logits_of_the_step_that_stored_them(streams: dict[str, Three], name: str) -> None:
    before, after = (load_artifact(streams[name].two, step) for step in (1, 2))
    assert before.exemplar_logits is not None
    assert after.exemplar_logits is not None
    sizes = [len(keys) for keys in before.memory.keys.values()]
    first = [sum(sizes[:number]) for number in range(len(sizes))]
    kept = [row for start in first for row in range(start, start + 5)]
    assert torch.equal(after.exemplar_logits.values[:15, :3], before.exemplar_logits.values[kept])
    assert not after.exemplar_logits.values[:15, 3:].any()
    assert after.exemplar_logits.counts.tolist() == [1] * 5 + [3] * 10 + [6] * 15


def test_the_sums_of_a_blurred_stream_have_the_clips_that_have_arrived(streams: dict[str, Three]) -> None:
    counts = [len(load_artifact(streams["kernel blurred"].one, step).method["labels"]) for step in range(3)]
    manifest = load_manifest(load_artifact(streams["kernel blurred"].one, 2).config.data.manifest)
    config = load_artifact(streams["kernel blurred"].one, 2).config
    scenario = configured_scenario(config.scenario, manifest.classes)
    views = [arrived(manifest, scenario, config.scenario, step) for step in range(3)]
    expected = [len(view.clips(scenario.seen(step), "train")) for step, view in enumerate(views)]
    assert counts == expected
    assert counts[-1] < 6 * 24


def test_old_proxies_stay_as_they_were(streams: dict[str, Three]) -> None:
    first, second = (load_artifact(streams["afc"].one, step).model for step in (0, 1))
    assert torch.equal(second["classifier.frozen"], first["classifier.proxies"])
    assert second["classifier.proxies"].shape == (SIZES[1] * 10, 16)


def test_a_network_of_step_0_stays_as_it_was(streams: dict[str, Three]) -> None:
    first, later = (load_artifact(streams["analytic network expanded"].one, step).model for step in (0, 2))
    assert all(torch.equal(later[name], weight) for name, weight in first.items())
