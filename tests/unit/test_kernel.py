"""Kernel ridge regression, against the formula on all clips at once in numpy."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, pdist

from avcil_dist.compose import load_config
from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.methods import make_method
from avcil_dist.methods.base import OneRank, StepContext
from avcil_dist.methods.kernel import COMPARED, Kernel, median_distance
from avcil_dist.methods.row_blocks import solve_in_row_blocks
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario
from avcil_dist.training.preflight import preflight
from tests.helpers.streams import write_config

CELLS, DIM, PER_CLASS, CLASSES = 3, 5, 20, 4
SCENARIO = Scenario((("c2", "c0"), ("c3",), ("c1",)))
LABELS = np.repeat(np.arange(CLASSES), PER_CLASS)


def clips_of(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Sound (clips, D) and pictures (clips, cells, D)."""
    random = torch.Generator().manual_seed(int(name[1:]))
    rows = torch.randn(PER_CLASS, CELLS + 1, DIM, generator=random) + torch.randn(CELLS + 1, DIM, generator=random)
    return rows[:, 0], rows[:, 1:]


def output_of(audio: torch.Tensor | None, visual: torch.Tensor | None) -> Output:
    rows = audio if audio is not None else visual
    assert rows is not None
    return Output(torch.zeros(len(rows), 0), audio, visual)


def kernel_method(**options: Any) -> Kernel:
    method = make_method(MethodConfig.model_validate({"name": "kernel"} | options))
    assert isinstance(method, Kernel)
    return method


def learn(*modalities: str, last_step: dict[str, Any] | None = None, **options: Any) -> Kernel:
    """All steps, each by a new method with the state of the one before, as it comes out of an artifact.

    `last_step` are options that differ in the last step.
    """
    state: dict[str, Any] = {}
    for step in range(SCENARIO.num_steps):
        is_last = step + 1 == SCENARIO.num_steps
        method = kernel_method(**options | ((last_step or {}) if is_last else {}))
        method.restore(state, SCENARIO.num_old(step), "the step before")
        method.begin_step(StepContext(SCENARIO, step))
        for new in SCENARIO.new(step):
            for audio, visual in zip(*(part.split(6) for part in clips_of(new)), strict=True):
                parts = {"audio": audio, "visual": visual}
                given = [parts[name] if name in modalities else None for name in ("audio", "visual")]
                method.accumulate(output_of(*given), torch.full((len(audio),), SCENARIO.labels[new]))
        assert method.statistics() == []
        method.choose(method.solve(), [])
        state = {
            k: v if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in method.state_dict().items()
        }
    return method


def unit_rows(rows: torch.Tensor) -> np.ndarray:
    """Tokens of length 1 side by side, rounded to float16 as they are kept."""
    tokens = rows.numpy() / np.linalg.norm(rows.numpy(), axis=-1, keepdims=True)
    return tokens.reshape(len(tokens), -1).astype(np.float16).astype(np.float64)


def all_clips() -> dict[str, np.ndarray]:
    pairs = [clips_of(name) for name in SCENARIO.classes]
    return {
        "audio": unit_rows(torch.cat([audio for audio, _ in pairs])),
        "visual": unit_rows(torch.cat([visual for _, visual in pairs])),
    }


def expected_scores(
    tested: dict[str, np.ndarray], weights: dict[str, float], gamma: float = 0.01, landmarks: Any = None
) -> np.ndarray:
    """Exact scores; with landmarks those of the subset of regressors."""
    kept, step_0 = all_clips(), slice(0, 2 * PER_CLASS)
    medians = {name: np.median(pdist(kept[name][step_0], "sqeuclidean")) for name in weights}

    def kernel(rows: dict[str, np.ndarray]) -> np.ndarray:
        parts = [w * np.exp(-cdist(rows[n], kept[n], "sqeuclidean") / medians[n]) for n, w in weights.items()]
        return np.sum(parts, axis=0) + 1

    targets = np.eye(CLASSES)[LABELS]
    if landmarks is None:
        return kernel(tested) @ np.linalg.solve(kernel(kept) + gamma * np.eye(len(LABELS)), targets)
    some = kernel(kept)[:, landmarks]
    return kernel(tested)[:, landmarks] @ np.linalg.solve(some.T @ some + gamma * some[landmarks], some.T @ targets)


def new_clips() -> tuple[Output, dict[str, np.ndarray]]:
    random = torch.Generator().manual_seed(99)
    audio, visual = torch.randn(7, DIM, generator=random), torch.randn(7, CELLS, DIM, generator=random)
    return output_of(audio, visual), {"audio": unit_rows(audio), "visual": unit_rows(visual)}


@pytest.mark.parametrize("keep_factor", [False, True])
def test_the_scores_are_those_of_the_kernel_regression_on_all_clips(keep_factor: bool) -> None:
    output, tested = new_clips()
    method = learn("audio", "visual", keep_factor=keep_factor)
    expected = expected_scores(tested, {"visual": 0.7, "audio": 0.3})
    np.testing.assert_allclose(method.scores(output).numpy(), expected, atol=2e-3)
    factors = {name for name in method.state_dict() if name.startswith("factor")}
    assert factors == ({"factor_000", "factor_001", "factor_002"} if keep_factor else set())


def test_appended_rows_and_a_factor_computed_anew_give_the_same_head() -> None:
    appended, anew = (learn("audio", "visual", keep_factor=keep).weights for keep in (True, False))
    assert appended is not None
    torch.testing.assert_close(appended, anew, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("changed", [{"gamma": 1.0}, {"visual_weight": 0.2}, {"keep_factor": False}])
def test_a_factor_of_other_options_is_not_extended(changed: dict[str, Any]) -> None:
    found = learn("audio", "visual", keep_factor=True, last_step=changed)
    expected = learn("audio", "visual", **{"keep_factor": True} | changed)
    assert found.weights is not None
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-9, atol=1e-9)
    kernel_method(**{"keep_factor": True} | changed).restore(found.state_dict(), CLASSES, "step_002")


@pytest.mark.parametrize(("weight", "gamma"), [(0.4, 0.5), (0.9, 0.02)])
def test_the_weight_of_the_pictures_and_the_ridge_are_options(weight: float, gamma: float) -> None:
    output, tested = new_clips()
    found = learn("audio", "visual", visual_weight=weight, gamma=gamma).scores(output).numpy()
    expected = expected_scores(tested, {"visual": weight, "audio": 1 - weight}, gamma)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_beyond_the_limit_the_scores_are_those_of_the_landmarks() -> None:
    output, tested = new_clips()
    method = learn("audio", "visual", max_clips=60, landmarks=25, landmark_seed=3)
    assert method.remark == "kernel: 80 clips, more than method.max_clips=60; approximated by 25 landmarks"
    assert method.landmarks is not None
    landmarks = method.landmarks.numpy()
    assert len(set(landmarks)) == 25
    expected = expected_scores(tested, {"visual": 0.7, "audio": 0.3}, landmarks=landmarks)
    np.testing.assert_allclose(method.scores(output).numpy(), expected, atol=2e-3)
    for missing, kept in (("audio", {"visual": 0.7}), ("visual", {"audio": 0.3})):
        found = method.scores(output._replace(**{missing: None})).numpy()
        np.testing.assert_allclose(found, expected_scores(tested, kept, landmarks=landmarks), atol=2e-3)
    again = [learn("audio", max_clips=60, landmarks=25, landmark_seed=seed).landmarks for seed in (3, 4)]
    assert again[0] is not None
    assert again[1] is not None
    assert torch.equal(again[0], method.landmarks)
    assert not torch.equal(again[1], method.landmarks)


def test_with_all_clips_as_landmarks_the_approximation_is_exact() -> None:
    output, _ = new_clips()
    method, exact = learn("audio", "visual", max_clips=1, landmarks=4096), learn("audio", "visual")
    assert method.landmarks is not None
    assert method.landmarks.tolist() == list(range(80))
    torch.testing.assert_close(method.scores(output), exact.scores(output), atol=2e-5, rtol=0)


def test_equal_clips_as_landmarks_have_finite_scores() -> None:
    method = kernel_method(max_clips=1, landmarks=40)
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    audio = torch.randn(10, DIM).repeat(4, 1)
    method.accumulate(output_of(audio, None), torch.arange(40) % 2)
    method.statistics()
    method.choose(method.solve(), [])
    assert method.scores(output_of(audio, None)).isfinite().all()


@pytest.mark.parametrize("rows", [1, 5, 23, 64])
def test_a_system_is_solved_in_blocks_of_any_size(rows: int) -> None:
    random = torch.Generator().manual_seed(0)
    factor, targets = (torch.randn(23, width, generator=random, dtype=torch.float64) for width in (30, 3))
    matrix, given = factor @ factor.T, targets.clone()
    found = solve_in_row_blocks(lambda block: matrix[block, : block.stop].clone(), targets, OneRank(), rows=rows)
    np.testing.assert_allclose(found.numpy(), np.linalg.solve(matrix.numpy(), given.numpy()), rtol=1e-9, atol=1e-12)
    assert torch.equal(targets, given)


@pytest.mark.parametrize("modality", ["audio", "visual"])
def test_one_modality_has_one_kernel_of_weight_1(modality: str) -> None:
    output, tested = new_clips()
    other = {"audio": "visual", "visual": "audio"}[modality]
    found = learn(modality).scores(output._replace(**{other: None})).numpy()
    np.testing.assert_allclose(found, expected_scores(tested, {modality: 1.0}), atol=2e-3)


@pytest.mark.parametrize(("missing", "weights"), [("audio", {"visual": 0.7}), ("visual", {"audio": 0.3})])
def test_without_a_modality_the_regression_is_on_the_kernel_of_the_other_one(
    missing: str, weights: dict[str, float]
) -> None:
    output, tested = new_clips()
    method = learn("audio", "visual")
    assert method.takes_one_modality
    for _ in range(2):  # solved, and kept
        found = method.scores(output._replace(**{missing: None})).numpy()
        np.testing.assert_allclose(found, expected_scores(tested, weights), atol=2e-3)
    np.testing.assert_allclose(
        method.scores(output).numpy(), expected_scores(tested, {"visual": 0.7, "audio": 0.3}), atol=2e-3
    )


def test_the_state_is_float16_features_and_what_follows_from_them() -> None:
    state = learn("audio", "visual").state_dict()
    sizes = {name: value.nbytes for name, value in state.items() if isinstance(value, torch.Tensor)}
    clips = CLASSES * PER_CLASS
    assert sizes == {
        "audio": 2 * clips * DIM,
        "visual": 2 * clips * CELLS * DIM,
        "labels": 8 * clips,
        "weights": 8 * clips * CLASSES,
    }


def test_the_median_of_many_clips_is_that_of_evenly_spaced_ones() -> None:
    line = torch.arange(2.0 * COMPARED + 1)[:, None]
    spaced = median_distance(line)  # every third one
    assert spaced == np.median(pdist(line[::3].numpy(), "sqeuclidean"))
    assert median_distance(torch.tensor([[0.0], [0.5]])) == 0.25
    assert median_distance(torch.zeros(1, 3)) == 1.0
    assert median_distance(torch.ones(4, 3)) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((80,), 4)}, "labels of classes that are not seen"),
        ({"labels": torch.zeros(79, dtype=torch.long)}, "labels: not 80 whole numbers"),
        ({"audio": torch.zeros(79, DIM, dtype=torch.float16)}, "audio: a matrix of"),
        ({"audio": torch.full((80, DIM), torch.nan, dtype=torch.float16)}, "not finite"),
        ({"medians": {"audio": 0.0, "visual": 1.0}}, "medians are no positive numbers"),
        ({"medians": {"audio": 1.0}}, "medians are no positive numbers"),
        ({"factor_002": torch.zeros(19, 80, dtype=torch.float64)}, "factor_002: a matrix of"),
    ],
)
def test_a_state_that_no_step_made_is_refused(change: dict[str, Any], message: str) -> None:
    state = learn("audio", "visual", keep_factor=True).state_dict()
    kernel_method(keep_factor=True).restore(state, CLASSES, "step_002")
    with pytest.raises(ArtifactError, match=message):
        kernel_method(keep_factor=True).restore(state | change, CLASSES, "step_002")


@pytest.mark.parametrize(
    "landmarks", [torch.arange(24), torch.zeros(25, dtype=torch.long), torch.arange(56, 81), torch.arange(25.0)]
)
def test_landmarks_that_no_step_drew_are_refused(landmarks: torch.Tensor) -> None:
    state = learn("audio", "visual", max_clips=60, landmarks=25).state_dict()
    kernel_method().restore(state, CLASSES, "step_002")
    with pytest.raises(ArtifactError, match="landmarks: not"):
        kernel_method().restore(state | {"landmarks": landmarks}, CLASSES, "step_002")


def test_features_of_another_length_are_refused() -> None:
    method = learn("audio", "visual")
    output, _ = new_clips()
    assert output.audio is not None
    longer = output._replace(audio=torch.cat([output.audio, output.audio], dim=1))
    with pytest.raises(ArtifactError, match="is of 5 audio features, these are 10"):
        method.scores(longer)
    method.begin_step(StepContext(SCENARIO, 2))
    method.accumulate(longer, torch.zeros(7, dtype=torch.long))
    with pytest.raises(ArtifactError, match="is of 5 audio features, these are 10"):
        method.statistics()


def test_features_that_are_not_finite_are_an_error_of_one_line() -> None:
    method = kernel_method()
    method.begin_step(StepContext(Scenario((("a",),)), 0))
    method.accumulate(output_of(torch.full((3, DIM), torch.nan), None), torch.zeros(3, dtype=torch.long))
    method.statistics()
    with pytest.raises(ConfigError, match=r"^method.gamma is too small for these features, or they have values"):
        method.solve()


def test_without_landmarks_more_clips_than_the_limit_are_refused_before_the_run(tmp_path: Path) -> None:
    path = str(write_config(tmp_path))
    words = ["method=kernel", "method.max_clips=143"]
    preflight(load_config(path, words), [1], restart=True)
    preflight(load_config(path, ["method=kernel", "method.max_clips=144", "method.landmarks=0"]), [1], restart=True)
    with pytest.raises(ConfigError) as raised:
        preflight(load_config(path, [*words, "method.landmarks=0"]), [1], restart=True)
    assert str(raised.value).startswith("method.max_clips=143: method kernel keeps the features of all 144 training")
    assert "\n" not in str(raised.value)
