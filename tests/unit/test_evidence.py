"""Ridge by evidence, against a direct computation with whole matrices and explicit inverses in numpy."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from avcil_dist.config.schema import MethodConfig
from avcil_dist.errors import ArtifactError, ConfigError
from avcil_dist.methods import feature_sums, make_method
from avcil_dist.methods.analytic import Analytic
from avcil_dist.methods.base import StepContext
from avcil_dist.methods.evidence import evidence_ridge
from avcil_dist.methods.feature_sums import FeatureSums, RidgeSolver
from avcil_dist.methods.single_precision import SingleSolver
from avcil_dist.models.outputs import Output
from avcil_dist.scenario import Scenario

CELLS, DIM, PER_CLASS, CLASSES = 3, 7, 40, 6
SCENARIOS = [
    Scenario((("c0", "c1", "c2", "c3", "c4", "c5"),)),
    Scenario((("c4",), ("c1", "c5", "c0"), ("c3", "c2"))),
]


def clips_of(number: int, informative: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Sound (clips, D), and pictures (clips, cells, D), of which the first `informative` cells depend on the class."""
    random = np.random.default_rng(number)
    means = random.normal(size=(1 + CELLS, DIM))
    audio = 2 * means[0] + random.normal(size=(PER_CLASS, DIM))
    visual = random.normal(size=(PER_CLASS, CELLS, DIM))
    visual[:, :informative] += means[1 : 1 + informative]
    return audio.astype(np.float32), visual.astype(np.float32)


def evidence_method() -> Analytic:
    method = make_method(MethodConfig.model_validate({"name": "analytic", "gamma": "evidence", "unit_length": True}))
    assert isinstance(method, Analytic)
    return method


def learn(scenario: Scenario, informative: int = 1) -> Analytic:
    """All steps, each by a new method with the state of the one before, as it comes out of an artifact."""
    state: dict[str, Any] = {}
    for step in range(scenario.num_steps):
        method = evidence_method()
        method.load_state_dict(state)
        method.begin_step(StepContext(scenario, step))
        for name in scenario.new(step):
            audio, visual = map(torch.from_numpy, clips_of(int(name[1:]), informative))
            for rows in torch.arange(PER_CLASS).split(9):
                output = Output(torch.zeros(len(rows), 0), audio[rows], visual[rows])
                method.accumulate(output, torch.full((len(rows),), scenario.labels[name]))
        method.statistics()
        method.choose(method.solve(), [])
        state = {
            k: v if isinstance(v, torch.Tensor) else json.loads(json.dumps(v)) for k, v in method.state_dict().items()
        }
    return method


def unit_features(audio: np.ndarray, visual: np.ndarray) -> np.ndarray:
    """φ of unit tokens, float32 as the method has it, with the constant."""
    tokens = np.concatenate([audio[:, None], visual], axis=1)
    tokens = tokens / np.maximum(np.linalg.norm(tokens, axis=2, keepdims=True), 1e-6)
    return np.concatenate([tokens.reshape(len(tokens), -1), np.ones((len(tokens), 1))], axis=1)


def all_clips(scenario: Scenario, informative: int = 1) -> tuple[np.ndarray, np.ndarray]:
    parts = [unit_features(*clips_of(int(name[1:]), informative)) for name in scenario.classes]
    labels = np.repeat(np.arange(len(parts)), PER_CLASS)
    return np.concatenate(parts), np.eye(len(parts))[labels]


def maximum_evidence(x: np.ndarray, y: np.ndarray, widths: list[int]) -> tuple[np.ndarray, int]:
    """α/β per feature by explicit inverses, and the number of rounds. Guards are for data without noise."""
    n, c = y.shape
    blocks = np.split(np.arange(sum(widths)), np.cumsum(widths)[:-1])
    alpha, beta = np.ones(len(widths)), float(c)

    def precisions() -> np.ndarray:
        return np.append(np.repeat(alpha, widths), 1e-3)

    rounds = 0
    while rounds < 8:
        rounds += 1
        covariance = np.linalg.inv(beta * x.T @ x + np.diag(precisions()))
        w = beta * covariance @ x.T @ y
        s = np.array([len(b) - a * covariance[b, b].sum() for a, b in zip(alpha, blocks, strict=True)])
        s = np.maximum(s, 1e-6)
        new = np.array([c * g / np.square(w[b]).sum() for g, b in zip(s, blocks, strict=True)])
        beta = c * max(n - s.sum(), 1e-6) / max(np.square(y - x @ w).sum(), 1e-12 * n)
        change, alpha = np.abs(np.log(new / alpha)).max(), new
        if change < 0.05:
            break
    return precisions() / beta, rounds


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(("informative", "expected_rounds"), [(1, 8), (CELLS, 3)])
def test_any_steps_in_any_order_give_the_ridge_of_maximum_evidence(
    scenario: Scenario, informative: int, expected_rounds: int
) -> None:
    method = learn(scenario, informative)
    x, y = all_clips(scenario, informative)
    ridge, rounds = maximum_evidence(x, y, [DIM] * (CELLS + 1))
    assert rounds == expected_rounds  # all of them, or until nothing changes
    assert method.ridge is not None
    assert method.weights is not None
    np.testing.assert_allclose(method.ridge.numpy(), ridge, rtol=1e-5)
    np.testing.assert_allclose(method.weights.numpy(), np.linalg.solve(x.T @ x + np.diag(ridge), x.T @ y), atol=1e-6)


def test_a_block_of_noise_has_a_larger_ridge_than_one_that_tells_the_classes_apart() -> None:
    ridge = learn(SCENARIOS[0]).ridge
    assert ridge is not None
    audio, informative, *noise = ridge[:-1].view(CELLS + 1, DIM)[:, 0].tolist()
    assert max(audio, informative) < 0.2 * min(noise)


def test_no_validation_clips_are_needed_and_the_state_is_the_sums_the_head_and_its_ridge() -> None:
    method = learn(SCENARIOS[0])
    assert not method.needs.validation
    assert set(method.state_dict()) == {"gamma", "ridge", "weights", "gram_000", "targets"}
    assert method.state_dict()["gamma"] is None


@pytest.mark.parametrize("missing", ["audio", "visual"])
def test_without_a_modality_the_head_is_that_of_the_features_that_are_left(missing: str) -> None:
    scenario = SCENARIOS[1]
    method = learn(scenario)
    restored = evidence_method()
    restored.begin_step(StepContext(scenario, scenario.num_steps - 1))
    restored.load_state_dict(method.state_dict())
    assert restored.takes_one_modality
    x, y = all_clips(scenario)
    kept = np.ones(x.shape[1], dtype=bool)
    kept[slice(DIM, -1) if missing == "visual" else slice(DIM)] = False
    ridge = method.ridge.numpy()[kept]  # type: ignore[union-attr]
    w = np.linalg.solve(x[:, kept].T @ x[:, kept] + np.diag(ridge), x[:, kept].T @ y)
    audio, visual = clips_of(2)
    output = Output(torch.zeros(PER_CLASS, 0), torch.from_numpy(audio), torch.from_numpy(visual))
    expected = unit_features(audio, visual)[:, kept] @ w
    for _ in range(2):  # solved, and kept
        scores = restored.scores(output._replace(**{missing: None}))
        np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)
    torch.testing.assert_close(restored.scores(output), method.scores(output))


def test_solving_for_the_features_that_are_left_beats_zeros_in_place_of_the_missing_ones() -> None:
    """Both modalities carry information, and pictures show what disturbs the sound.

    The whole head subtracts the disturbance. With zeros for pictures there is nothing to subtract, and the sound's
    weights, which need not avoid it, are the wrong ones for sound alone.
    """
    random = np.random.default_rng(6)
    shared, directions = random.normal(size=(CLASSES, DIM)), random.normal(size=(3, DIM))

    def clips() -> tuple[Output, torch.Tensor]:
        labels = np.repeat(np.arange(CLASSES), 100)
        disturbance = random.normal(size=(len(labels), 3))
        audio = shared[labels] + 2 * disturbance @ directions + 0.3 * random.normal(size=(len(labels), DIM))
        visual = 0.3 * random.normal(size=(len(labels), CELLS, DIM))
        visual[:, 0, :3] += 2 * disturbance
        visual[:, 1] += 0.3 * shared[labels]
        rows = torch.from_numpy(audio).float(), torch.from_numpy(visual).float()
        return Output(torch.zeros(len(labels), 0), *rows), torch.from_numpy(labels)

    method = evidence_method()
    method.begin_step(StepContext(SCENARIOS[0], 0))
    method.accumulate(*clips())
    method.statistics()
    method.choose(method.solve(), [])
    output, labels = clips()
    assert output.visual is not None

    def accuracy(given: Output) -> float:
        return float((method.scores(given).argmax(dim=1) == labels).double().mean())

    assert output.audio is not None
    for missing, rows in (("visual", output.visual), ("audio", output.audio)):
        solved = accuracy(output._replace(**{missing: None}))
        zeros = accuracy(output._replace(**{missing: 0 * rows}))
        assert zeros + 0.2 < solved < accuracy(output)


def test_the_inverse_of_a_factor_of_several_blocks_has_the_right_diagonal() -> None:
    size = 1300  # three blocks of columns, two panels
    random = torch.Generator().manual_seed(0)
    sums = FeatureSums()
    sums.add(torch.randn(1500, size, generator=random), torch.randint(4, (1500,), generator=random), 4)
    sums.flush(4)
    solver = RidgeSolver(sums.total())
    ridge = torch.linspace(0.5, 20, size, dtype=torch.float64)
    solver.fill()
    gram = solver.matrix.triu() + solver.matrix.triu(1).T
    assert solver.factorize(ridge)
    expected = np.linalg.inv(gram.numpy() + np.diag(ridge.numpy()))
    np.testing.assert_allclose(solver.solution().numpy(), expected @ solver.targets.numpy(), atol=1e-9)
    np.testing.assert_allclose(solver.inverse_diagonal().numpy(), np.diag(expected), rtol=1e-9)
    rows = torch.cat([torch.arange(900, 1100), torch.tensor([size - 1])])  # across both panels
    part = RidgeSolver(sums.total(), rows)
    part.fill()
    np.testing.assert_array_equal(part.matrix.triu().numpy(), gram[rows][:, rows].triu().numpy())


def sums_of(rows: torch.Tensor, num_classes: int = 4) -> FeatureSums:
    """Sums of features with a constant, of clips whose class is a function of the first two."""
    labels = 2 * (rows[:, 0] > rows[0, 0]).long() + (rows[:, 1] > rows[0, 1]).long()
    sums = FeatureSums()
    sums.add(torch.cat([rows, torch.ones(len(rows), 1)], dim=1), labels, num_classes)
    sums.flush(num_classes)
    return sums


def test_a_round_in_float32_has_the_solution_and_the_trace_of_float64() -> None:
    size = 1200  # two panels
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3000, size, generator=random) * torch.linspace(0.3, 2, size) + 5  # a large mean
    solver = RidgeSolver(sums_of(rows).total())
    ridge = torch.linspace(0.05, 20, size + 1, dtype=torch.float64)
    ridge[-1] = 1e-4
    solver.fill()
    gram = (solver.matrix.triu() + solver.matrix.triu(1).T).numpy()
    inverse = np.linalg.inv(gram + np.diag(ridge.numpy()))
    sums = sums_of(rows).total()
    found = SingleSolver(sums).round(ridge)
    assert found is not None
    expected = inverse @ solver.targets.numpy()
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(found[1].numpy()[:-1], np.diag(inverse)[:-1], rtol=2e-3)
    np.testing.assert_allclose(found[1].numpy()[:-1].sum(), np.diag(inverse)[:-1].sum(), rtol=1e-5)


def test_float32_is_not_used_where_it_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    random = torch.Generator().manual_seed(0)
    directions = torch.randn(40, 40, generator=random)
    rows = torch.randn(300, 40, generator=random) * 10.0 ** torch.linspace(-4, 1, 40) @ directions
    ridge = torch.full((41,), 1e-7, dtype=torch.float64)
    assert SingleSolver(sums_of(rows).total()).round(ridge) is None
    exact = evidence_ridge(RidgeSolver(sums_of(rows).total()), [slice(0, 40)])
    monkeypatch.setattr(feature_sums, "SINGLE_FROM", 1)
    single = evidence_ridge(RidgeSolver(sums_of(rows).total()), [slice(0, 40)])
    torch.testing.assert_close(single, exact, rtol=1e-3, atol=0)


@pytest.mark.parametrize("informative", [1, CELLS])
def test_the_evidence_by_rounds_in_float32_is_that_of_float64(
    informative: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = learn(SCENARIOS[0], informative)
    rounds: list[bool] = []
    by_float32 = SingleSolver.round

    def counted(solver: SingleSolver, ridge: torch.Tensor) -> Any:
        found = by_float32(solver, ridge)
        rounds.append(found is not None)
        return found

    monkeypatch.setattr(SingleSolver, "round", counted)
    monkeypatch.setattr(feature_sums, "SINGLE_FROM", 1)
    single = learn(SCENARIOS[0], informative)
    assert rounds == [True] * (8 if informative == 1 else 3)
    assert single.ridge is not None
    assert exact.ridge is not None
    torch.testing.assert_close(single.ridge, exact.ridge, rtol=1e-4, atol=0)
    torch.testing.assert_close(single.weights, exact.weights, rtol=1e-4, atol=1e-6)


def test_clips_are_not_kept_until_the_end_of_the_step() -> None:
    sums = FeatureSums()
    for number in range(9):
        assert bool(sums.total()) is (number == 8)  # after 1,024 clips
        sums.add(torch.ones(128, 3), torch.zeros(128, dtype=torch.long), 1)


def test_a_clip_per_class_and_features_of_zeros_have_a_ridge() -> None:
    method = evidence_method()
    method.begin_step(StepContext(Scenario((("a", "b"),)), 0))
    audio = torch.eye(2, DIM)
    method.accumulate(Output(torch.zeros(2, 0), audio, torch.zeros(2, CELLS, DIM)), torch.tensor([0, 1]))
    method.statistics()
    method.choose(method.solve(), [])
    assert method.ridge is not None
    assert method.ridge.isfinite().all()
    assert (method.ridge > 0).all()
    assert method.scores(Output(torch.zeros(2, 0), audio, torch.zeros(2, CELLS, DIM))).argmax(dim=1).tolist() == [0, 1]


def test_the_smallest_ridge_is_relative_to_the_features() -> None:
    """If the features determine y, the precision β grows without bound; large features need a larger ridge."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    rows = 1e7 * (torch.eye(2)[labels] + 1e-4 * torch.randn(40, 2, generator=random))
    sums = FeatureSums()
    sums.add(torch.cat([rows, torch.ones(40, 1)], dim=1), labels, 2)
    sums.flush(2)
    solver = RidgeSolver(sums.total())
    ridge = evidence_ridge(solver, [slice(0, 2)])
    solver.fill()
    smallest = 1e-11 * solver.matrix.diagonal().mean().item()
    assert ridge[-1].item() == pytest.approx(smallest)  # of the constant
    assert ridge[0].item() >= smallest * (1 - 1e-9)


def test_values_that_are_not_finite_are_an_error_of_one_line() -> None:
    sums = FeatureSums()
    sums.add(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 1]), 2)
    sums.flush(2)
    with pytest.raises(ConfigError, match=r"^method.gamma: the sums over the clips cannot be factorised"):
        evidence_ridge(RidgeSolver(sums.total()), [slice(0, 3)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ridge": torch.ones(3, dtype=torch.float64)}, "ridge: not 29 numbers"),
        ({"ridge": 1.0}, "ridge: not 29 numbers"),
        ({"ridge": -torch.ones(29, dtype=torch.float64)}, "ridge has numbers that are not positive"),
        ({"ridge": torch.full((29,), torch.inf, dtype=torch.float64)}, "ridge has numbers that are not positive"),
        ({"weights": torch.zeros(29, 5, dtype=torch.float64)}, "weights: a matrix of"),
        ({"gram_001": torch.zeros(1, 1, dtype=torch.float64)}, "it lacks sums, or has others"),
    ],
)
def test_a_state_that_no_step_made_is_refused(change: dict[str, Any], message: str) -> None:
    state = learn(SCENARIOS[0]).state_dict()
    evidence_method().restore(state, CLASSES, "step_000")
    with pytest.raises(ArtifactError, match=message):
        evidence_method().restore(state | change, CLASSES, "step_000")
