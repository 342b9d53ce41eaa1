"""Estimates against what is known in closed form, and one MeZO step against the plain algorithm."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from closed_form import ClosedForm, Quadratic
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference, Population
from mezo_lightning.evaluators import Copy, Evaluation, Samples
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler, derive_seed
from mezo_lightning.steps import Point, round_coefficient

SAMPLERS = [Gaussian(), Rademacher()]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-1, 10.0])
def test_a_quadratic_gives_its_directional_derivatives(sampler: Sampler, epsilon: float):
    """The central difference of a quadratic has no error, whatever epsilon."""
    quadratic = Quadratic(sampler)
    estimate = CentralDifference(epsilon, num_queries=3).estimate(quadratic, seed=5)
    assert estimate.seeds == tuple(derive_seed(5, query) for query in range(3))
    for seed, projected_grad in zip(estimate.seeds, estimate.projected_grads, strict=True):
        expected = float(quadratic.gradient() @ quadratic.direction(seed))
        assert projected_grad == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert estimate.scale == pytest.approx(1 / 3)
    assert estimate.pairs == ((0, 1), (2, 3), (4, 5))
    assert estimate.skipped is None


def test_all_points_are_asked_for_in_one_round():
    quadratic = Quadratic(Gaussian())
    estimate = CentralDifference(1e-3, num_queries=2).estimate(quadratic, seed=1)
    [points] = quadratic.rounds
    epsilon = round_coefficient(1e-3)
    assert [point.terms for point in points] == [((s, sign * epsilon),) for s in estimate.seeds for sign in (1, -1)]
    assert [point.label for point in points] == ["q0+", "q0-", "q1+", "q1-"]


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_queries", [1, 4])
def test_the_estimate_is_unbiased(sampler: Sampler, num_queries: int):
    """The mean over many seeds is the gradient, to within its own standard error, and shrinks with the queries."""
    quadratic, repeats = Quadratic(sampler, count=8), 500
    estimator = CentralDifference(1e-2, num_queries)
    estimates = torch.stack(
        [
            sum((e.scale * g * quadratic.direction(s) for s, g in zip(e.seeds, e.projected_grads, strict=True)), 0.0)
            for e in (estimator.estimate(quadratic, seed=seed) for seed in range(repeats))
        ]  # pyright: ignore[reportArgumentType]
    )
    gradient = quadratic.gradient()
    error = estimates.std(0) / math.sqrt(repeats)
    assert bool(((estimates.mean(0) - gradient).abs() < 4 * error).all())
    # E |g z - grad|^2 = (d + kurtosis - 2) |grad|^2 / q for a mean of q independent estimates.
    kurtosis = 3 if isinstance(sampler, Gaussian) else 1
    expected = (8 + kurtosis - 2) * float(gradient @ gradient) / num_queries
    assert float((estimates - gradient).square().sum(1).mean()) == pytest.approx(expected, rel=0.2)


def test_what_cannot_be_estimated_is_skipped_with_the_reason():
    def evaluate(points: Sequence[Point]) -> Evaluation:
        bad = torch.tensor([math.nan, 1.0])
        return Evaluation.of(points, [Samples.of(bad) for _ in points], 0.5)

    estimate = CentralDifference(1e-3).estimate(evaluate, seed=1)
    assert estimate.skipped == "the objective is not finite at point q0+"
    assert estimate.seeds == estimate.projected_grads == ()
    assert estimate.evaluation is not None


def test_a_failed_sample_does_not_reach_the_projected_grad():
    values = {1: torch.tensor([[1.0], [2.0], [100.0]]), -1: torch.tensor([[0.5], [1.0], [-100.0]])}
    mask = {1: torch.tensor([[True], [True], [True]]), -1: torch.tensor([[True], [True], [False]])}

    def evaluate(points: Sequence[Point]) -> Evaluation:
        signs = [1 if point.terms[0][1] > 0 else -1 for point in points]
        return Evaluation.of(points, [Samples(values[sign], mask[sign]) for sign in signs], 0.5)

    [projected_grad] = CentralDifference(0.5).estimate(evaluate, seed=1).projected_grads
    assert projected_grad == 0.75


@pytest.mark.parametrize(
    ("epsilon", "num_queries", "message"),
    [
        (0.0, 1, "epsilon=0.0 must be a positive number"),
        (-1e-3, 1, "epsilon=-0.001 must be"),
        (math.nan, 1, "epsilon=nan must be"),
        (math.inf, 1, "epsilon=inf must be"),
        (1e-40, 1, "epsilon=1e-40 must be"),
        (1e-3, 0, "num_queries=0 must be at least 1"),
    ],
)
def test_wrong_options_are_refused_by_name(epsilon: float, num_queries: int, message: str):
    with pytest.raises(ValueError, match=message):
        CentralDifference(epsilon, num_queries)


@pytest.mark.parametrize(("fitness", "size"), [("z_score", 1.0), ("centered_rank", 0.29)])
@pytest.mark.parametrize(("antithetic", "factor"), [(False, 1.0), (True, math.sqrt(2))])
def test_the_size_of_a_populations_step_is_the_stated_one(fitness: Any, size: float, antithetic: bool, factor: float):
    """Where the objective is linear; N / d of the step's square lies along the gradient, on top of what is stated."""
    count, members = 6000, 30
    slope = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    linear = ClosedForm(Gaussian(), torch.zeros(count, dtype=torch.float64), lambda x: slope @ x)
    estimate = Population(1e-2, members, antithetic, fitness).estimate(linear, seed=1)
    found = float(linear.dense(estimate).square().mean().sqrt())
    assert found == pytest.approx(factor * size / math.sqrt(members), rel=0.06)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


def plain_mezo_step(
    model: nn.Module, loss: Callable[[], Tensor], seeds: Sequence[int], epsilon: float, lr: float, decay: float
) -> list[float]:
    """Algorithm 2 of the paper as it is written, with z in memory, except that z is a slice of one flat vector."""
    params = list(model.parameters())
    sizes = [parameter.numel() for parameter in params]
    theta = [parameter.data.clone() for parameter in params]
    update = [torch.zeros_like(values) for values in theta]
    projected_grads = []
    for seed in seeds:
        flat = Gaussian().fill(torch.empty(sum(sizes)), seed, 0)
        z = [part.view(p.shape) for part, p in zip(flat.split(sizes), params, strict=True)]
        values = []
        for sign in (1, -1):
            for parameter, start, direction in zip(params, theta, z, strict=True):
                parameter.data = start + sign * epsilon * direction
            values.append(float(loss().double().mean()))
        projected_grads.append((values[0] - values[1]) / (2 * epsilon))
        for total, direction in zip(update, z, strict=True):
            total += projected_grads[-1] * direction / len(seeds)
    for parameter, start, total in zip(params, theta, update, strict=True):
        parameter.data = start - lr * total - (lr * decay * start if start.dim() >= 2 else 0)
    return projected_grads


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("kind", ["copy", "leaf"])
def test_a_whole_step_is_the_papers(num_queries: int, kind: str):
    torch.manual_seed(0)
    model, plain = Net(), Net()
    plain.load_state_dict(model.state_dict())
    ids, targets = torch.randint(9, (32,)), torch.randint(9, (32,))

    def loss(of: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(of(ids), targets, reduction="none")

    optimizer = MeZO(model.named_parameters(), lr=1e-2, weight_decay=0.1)
    evaluator = Copy(optimizer.space) if kind == "copy" else LeafScratch(model, optimizer.space)
    for step in range(3):
        estimate = CentralDifference(1e-3, num_queries).estimate(evaluator(loss(model)), seed=step)
        optimizer.step(estimate=estimate)
        with torch.no_grad():
            expected = plain_mezo_step(plain, loss(plain), estimate.seeds, round_coefficient(1e-3), lr=1e-2, decay=0.1)
        # Coefficients have 12 bits: 2^-12 of the update; the weights before it are then equal to within that.
        assert estimate.projected_grads == pytest.approx(expected, rel=2e-3, abs=2e-3)
        for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(parameter.data, other.data, rtol=0, atol=1e-4 * (step + 1))
