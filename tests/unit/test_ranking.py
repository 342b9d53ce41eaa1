"""Ranking: the published steps, votes on all pairs, and orders that an oracle gives."""

import math
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.estimators import Population, Ranking
from mezo_lightning.evaluators import Copy, Evaluation, Preferences, Samples
from mezo_lightning.measurements import step_record
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, derive_seed
from mezo_lightning.steps import GradientEstimate, Point

NAN = math.nan


def ranked(values: Tensor, valid: Tensor | None = None) -> GradientEstimate:
    """The estimate from an objective whose samples have these values [points, N]."""

    def evaluate(points: Sequence[Point]) -> Evaluation:
        mask = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
        return Evaluation.of(points, [Samples(v[:, None], m[:, None]) for v, m in zip(values, mask, strict=True)], 0.5)

    return Ranking(0.5, num_points=len(values)).estimate(evaluate, seed=3)


def voted(votes: list[list[float]], num_points: int) -> GradientEstimate:
    """The estimate from given votes: a row for each pair of points."""
    table = torch.tensor(votes, dtype=torch.float64)
    samples = Samples(torch.zeros(table.shape[1], 1), torch.zeros(table.shape[1], 1, dtype=torch.bool))

    def evaluate(points: Sequence[Point]) -> Evaluation:
        return Evaluation.of(points, [samples] * len(points), 0.5, lambda pairs: Preferences(table[: len(pairs)]))

    return Ranking(0.5, num_points=num_points).estimate(evaluate, seed=3)


def test_the_steps_are_those_of_zo_ranksgd():
    """Algorithm and equation as published, on materialised noise: edges of the graph of an order, best first."""
    lr, epsilon, count = 0.05, 0.1, 5
    curvature = torch.linspace(0.5, 2.0, 12, dtype=torch.float64)

    def loss(x: Tensor) -> float:
        return float((curvature * (x.double() - 1).square()).sum())

    x = nn.Parameter(torch.zeros(12))
    optimizer = MeZO([("x", x)], lr=lr)
    evaluate = Copy(optimizer.space)(lambda: torch.tensor([loss(x.detach())]))
    expected = torch.zeros(12)
    for step in range(4):
        noise = [Gaussian().fill(torch.empty(12), derive_seed(step, query), 0) for query in range(count)]
        order = sorted(range(count), key=lambda i: loss(expected + epsilon * noise[i]))
        edges = list(combinations(order, 2))  # the first of a pair is better
        expected = expected - lr * sum(noise[j] - noise[i] for i, j in edges) / len(edges)
        optimizer.step(estimate=Ranking(epsilon, count).estimate(evaluate, seed=step))
        assert torch.allclose(x.detach(), expected, atol=5e-5)  # coefficients have 12 bits
        expected = x.detach().clone()


def test_with_a_single_sample_it_is_four_times_the_estimate_of_centred_ranks():
    values = torch.tensor([[3.0], [1.0], [2.0], [2.0], [7.0]], dtype=torch.float64)

    def evaluate(points: Sequence[Point]) -> Evaluation:
        return Evaluation.of(points, [Samples(v[:, None], torch.ones(1, 1, dtype=torch.bool)) for v in values], 0.5)

    population = Population(0.5, len(values), fitness="centered_rank").estimate(evaluate, seed=3)
    ranking = ranked(values)
    assert ranking.seeds == population.seeds
    expected = [4 * population.scale * w for w in population.projected_grads]
    assert [ranking.scale * g for g in ranking.projected_grads] == pytest.approx(expected)
    assert ranking.projected_grads == (2.0, -4.0, -1.0, -1.0, 4.0)


def test_each_sample_has_an_order_of_its_own():
    estimate = ranked(torch.tensor([[1.0, 30.0], [2.0, 20.0], [3.0, 10.0]]))
    assert estimate.projected_grads == (0.0, 0.0, 0.0)  # two samples that contradict one another
    estimate = ranked(torch.tensor([[1.0, 1.0, 3.0], [2.0, 2.0, 2.0], [3.0, 3.0, 1.0]]))
    assert estimate.projected_grads == pytest.approx((-2 / 3, 0.0, 2 / 3))
    assert estimate.scale == 1 / 3
    assert estimate.pairs == ((0, 1), (0, 2), (1, 2))


def test_votes_that_go_round_in_a_circle_cancel():
    assert voted([[1.0], [-1.0], [1.0]], 3).projected_grads == (0.0, 0.0, 0.0)  # 0 beats 1 beats 2 beats 0


def test_a_pair_without_an_opinion_has_no_part_in_the_mean():
    estimate = voted([[1.0, NAN], [NAN, NAN], [0.0, 0.5]], 3)
    assert estimate.projected_grads == (-1.0, 0.75, 0.25)
    assert estimate.scale == 1 / 2


def test_too_few_answers_skip_the_step():
    estimate = voted([[1.0, NAN], [NAN, NAN], [NAN, NAN]], 3)
    assert estimate.skipped == "1 of 6 comparisons have an answer, fewer than 50%"
    assert estimate.seeds == ()


def test_ties_are_no_signal_and_are_counted():
    estimate = ranked(torch.ones(4, 3))
    assert (estimate.projected_grads, estimate.skipped) == ((0.0,) * 4, None)
    assert step_record(estimate, 1, [0.1], 1.0).tie_fraction == 1.0
    assert not Ranking().needs_values


@pytest.mark.parametrize(("points", "gain"), [(2, 1.0), (4, 2.71), (8, 6.38)])
def test_the_squared_alignment_relative_to_mezo(points: int, gain: float):
    """On a linear objective of many dimensions, where only the slopes along the directions matter.

    The squared cosine is (sum w s)^2 / (sum w^2 d) for slopes s, with an error of order 1/d; that of MeZO is 1 / d.
    """
    slopes = torch.randn(4096, points, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gains = []
    for trial in slopes[:, :, None]:
        weights = torch.tensor(ranked(trial).projected_grads, dtype=torch.float64)
        gains.append(float((weights @ trial[:, 0]).square() / weights.square().sum()))
    assert sum(gains) / len(gains) == pytest.approx(gain, rel=0.05)


@pytest.mark.parametrize(
    ("epsilon", "num_points", "message"),
    [(0.0, 4, "epsilon=0.0"), (1e-3, 1, "num_points=1 must be at least 2")],
)
def test_wrong_options_are_refused_by_name(epsilon: float, num_points: int, message: str):
    with pytest.raises(ValueError, match=message):
        Ranking(epsilon, num_points)
