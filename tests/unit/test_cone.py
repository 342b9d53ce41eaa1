"""ConMeZO: against its formula with dense tensors, and what it takes for granted in many dimensions."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_form import ClosedForm, Quadratic
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference, Cone
from mezo_lightning.evaluators import Evaluation
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, derive_seed
from mezo_lightning.scaled import Scaled
from mezo_lightning.steps import GradientEstimate
from mezo_lightning.structured import LowRank
from mezo_lightning.transforms import Clip, Sign, Standardize
from mezo_lightning.updates import Momentum, Trail

TEZO = LowRank(2, core="diagonal", refresh_left=None, refresh_right=None)
HALF_OF_LOZO = LowRank(1, refresh_left=0, refresh_right=None)
LR, EPSILON, ANGLE = 2.0**-6, 2.0**-4, 1.0


def optimizer_of(count: int, **options: Any) -> tuple[MeZO, nn.Parameter]:
    x = nn.Parameter(torch.zeros(count))
    return MeZO([("x", x)], **({"lr": LR, "update": Trail(0.9, 20)} | options)), x


def steps(
    objective: ClosedForm, optimizer: MeZO, x: nn.Parameter, cone: Cone, count: int
) -> Iterator[GradientEstimate]:
    """A plain loop: the objective is measured where the optimizer has the weights."""
    x.data.copy_(objective.theta)
    for number in range(count):
        estimate = cone.knowing(optimizer).estimate(objective, seed=derive_seed(1, number))
        yield estimate
        optimizer.step(estimate=estimate)
        objective.theta = x.detach().double()


def dense(objective: ClosedForm, terms: Sequence[tuple[int, float]]) -> Tensor:
    return sum((c * objective.direction(seed) for seed, c in terms), torch.zeros_like(objective.theta))


def test_the_formula_with_a_dense_momentum():
    """With the length that the momentum really has, while the window holds all steps.

    In so many dimensions the code's is that to within half a percent. A step without an estimate is no step of the
    momentum.
    """
    count, lr = 20_000, 2.0**-16
    slope, widths = torch.randn(2, count, generator=torch.Generator().manual_seed(0)).double()
    start = torch.zeros(count, dtype=torch.float64)
    objective = ClosedForm(Gaussian(), start, lambda x: slope @ x + widths.abs() @ x.square() / 2)
    optimizer, x = optimizer_of(count, lr=lr)
    theta, m = start.clone(), start.clone()
    for number, estimate in enumerate(steps(objective, optimizer, x, Cone(EPSILON, ANGLE), 12)):
        if number == 5:
            optimizer.step(estimate=GradientEstimate(skipped="all samples failed"))
        u = objective.direction(derive_seed(derive_seed(1, number), 0))
        z = math.cos(ANGLE) * math.sqrt(count) * m / m.norm() + math.sin(ANGLE) * u if number else u
        ahead, back = (objective.function(theta + way * EPSILON * z) for way in (1, -1))
        g = float(ahead - back) / (2 * EPSILON)
        found = dense(objective, list(zip(estimate.seeds, estimate.weights, strict=True)))
        assert float((found - z).norm() / z.norm()) < 5e-3
        assert estimate.projected_grads[0] == pytest.approx(g, rel=0.01, abs=0.005 * float(slope.norm()))
        m, theta = 0.9 * m + g * z, theta - lr * g * z
    assert len(optimizer.memory.estimates[0]) == 12
    assert float((objective.theta - theta).norm() / theta.norm()) < 5e-3


def test_in_many_dimensions_z_is_as_long_as_a_random_direction_and_at_its_angle():
    """Which is what dividing m by the root of its squared coefficients stands for."""
    count = 20_000
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(count, generator=generator).double()
    objective = ClosedForm(Gaussian(), torch.zeros(count, dtype=torch.float64), lambda x: slope @ x)
    optimizer, x = optimizer_of(count, lr=0.0)
    for number, estimate in enumerate(steps(objective, optimizer, x, Cone(EPSILON), 10)):
        z = dense(objective, list(zip(estimate.seeds, estimate.weights, strict=True)))
        assert float(z.square().mean().sqrt()) == pytest.approx(1.0, abs=0.03)
        if number:
            m = dense(objective, optimizer.memory.estimates[0])
            assert float(m @ z / m.norm() / z.norm()) == pytest.approx(math.cos(1.35), abs=0.03)


def test_the_bias_around_a_momentum_is_the_stated_one():
    """Over new directions u, the mean of g z is ``sin^2 grad + cos^2 (m . grad) m``, m with coordinates of size 1."""
    slope = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    objective = ClosedForm(Gaussian(), torch.zeros(8, dtype=torch.float64), lambda x: slope @ x)
    optimizer, x = optimizer_of(8, lr=0.0)
    for _ in steps(objective, optimizer, x, Cone(EPSILON, ANGLE), 3):
        pass
    terms = optimizer.memory.estimates[0]
    m = dense(objective, terms) / math.sqrt(sum(c * c for _, c in terms))
    cone = Cone(EPSILON, ANGLE).knowing(optimizer)
    found = torch.stack([objective.dense(cone.estimate(objective, seed=derive_seed(7, i))) for i in range(400)])
    error = found.std(0) / math.sqrt(len(found))
    expected = math.sin(ANGLE) ** 2 * slope + math.cos(ANGLE) ** 2 * (m @ slope) * m
    assert bool(((found.mean(0) - expected).abs() < 4 * error).all())
    assert bool(((expected - slope).abs() > 8 * error).any())  # MeZO's mean is another one


def aligned(cone: Cone, trail: Trail, trials: int, count: int = 2000) -> float:
    """The squared alignment of z with a fixed gradient, relative to that of a random direction; from step 40 on."""
    found = []
    for trial in range(trials):
        slope = torch.randn(count, generator=torch.Generator().manual_seed(trial)).double()
        objective = ClosedForm(Gaussian(), torch.zeros(count, dtype=torch.float64), lambda x, slope=slope: slope @ x)
        optimizer, x = optimizer_of(count, lr=0.0, update=trail)
        for number, estimate in enumerate(steps(objective, optimizer, x, cone, 80)):
            if number >= 40:
                z = dense(objective, estimate.terms)
                found.append(float((z @ slope) ** 2 / (z @ z) / (slope @ slope)) * count)
    return sum(found) / len(found)


def test_around_its_momentum_it_is_closer_to_the_gradient_than_by_chance():
    assert aligned(Cone(EPSILON, 0.8), Trail(0.99, 20), trials=3) > 1.7


def test_the_momentum_has_the_newest_directions_of_a_window():
    objective = Quadratic(Gaussian())
    optimizer, x = optimizer_of(40, update=Trail(0.9, 3))
    found = list(steps(objective, optimizer, x, Cone(EPSILON), 6))
    new = [derive_seed(derive_seed(1, number), 0) for number in range(6)]
    assert [list(estimate.seeds) for estimate in found] == [new[max(0, n - 3) : n + 1][::-1] for n in range(6)]
    assert [seed for seed, _ in optimizer.memory.estimates[0]] == new[:2:-1]


@pytest.mark.parametrize(("transform", "size"), [(Clip(0.25), 0.25), (Sign(), 1.0), (Standardize(), 1.0)])
def test_transforms_act_on_the_projected_gradient_and_do_not_turn_the_direction(transform: Any, size: float):
    objective = Quadratic(Gaussian())
    optimizer, x = optimizer_of(40)
    *_, estimate = steps(objective, optimizer, x, Cone(EPSILON), 4)
    g = estimate.projected_grads[0]
    assert abs(g) > 0.25
    expected = [(seed, math.copysign(size, g) * w) for seed, w in zip(estimate.seeds, estimate.weights, strict=True)]
    assert transform(estimate).terms == tuple((seed, pytest.approx(c)) for seed, c in expected)
    assert len({abs(c) for _, c in expected}) == 4


def test_a_momentum_of_ties_alone_is_none():
    objective = ClosedForm(Gaussian(), torch.zeros(5, dtype=torch.float64), lambda x: torch.tensor(0.5))
    optimizer, x = optimizer_of(5)
    assert [e.weights for e in steps(objective, optimizer, x, Cone(EPSILON), 3)] == [(1.0,)] * 3


def test_what_the_optimizer_remembers_is_all_that_a_resumed_run_needs():
    """The same optimizer state, the same points; and none of it is the estimator's."""
    cone, objective = Cone(EPSILON), Quadratic(Gaussian())
    optimizer, x = optimizer_of(40)
    for _ in steps(objective, optimizer, x, cone, 3):
        pass
    other, _ = optimizer_of(40)
    other.load_state_dict(optimizer.state_dict())
    asked: list[Any] = []

    def watch(points: Any) -> Evaluation:
        asked.append(points)
        return objective(points)

    for resumed in (optimizer, other):
        cone.knowing(resumed).estimate(watch, seed=9)
    assert asked[0] == asked[1]
    assert len(asked[0][0].terms) == 4
    assert cone == Cone(EPSILON)


def test_others_need_no_memory():
    optimizer, _ = optimizer_of(5, update=None)
    assert CentralDifference().knowing(optimizer) == CentralDifference()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cone(angle=0.0), r"Cone\(angle=0.0\) must be above 0 and below pi / 2"),
        (lambda: Cone(angle=math.pi / 2), "the rule would be CentralDifference"),
        (lambda: Cone(angle=math.nan), "must be above 0"),
        (lambda: Cone(epsilon=0.0), "epsilon=0.0 must be a positive number"),
        (lambda: Trail(beta=1.0), r"Trail\(beta=1.0\) must be at least 0 and below 1"),
        (lambda: Trail(window=0), r"Trail\(window=0\) must be at least 1 step"),
        (lambda: Cone().knowing(optimizer_of(5, update=None)[0]), "with update=None .*: give .* `update: Trail`"),
        (lambda: Cone().knowing(optimizer_of(5, update=Momentum())[0]), r"with update=Momentum\(.*`update: Trail`"),
        (
            lambda: Cone().knowing(optimizer_of(5, sampler=TEZO)[0]),
            r"estimator=Cone .* with sampler=LowRank\(.* they share a factor: give LowRank refresh_left: 0 and",
        ),
        (lambda: Cone().knowing(optimizer_of(5, sampler=Scaled({"x": 2.0}, TEZO))[0]), r"sampler=Scaled\(.*a factor"),
        (lambda: Cone().knowing(optimizer_of(5, sampler=HALF_OF_LOZO)[0]), r"sampler=LowRank\(.*a factor"),
        (lambda: optimizer_of(5, update=Trail(window=1), sampler=LowRank()), "directions of earlier steps again"),
        (lambda: optimizer_of(5, sampler=Scaled({"x": 2.0}, LowRank())), "directions of earlier steps again"),
    ],
)
def test_what_cannot_work_is_refused_by_name(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_weights_are_part_of_an_estimate():
    estimate = GradientEstimate((1, 2), (3.0, 3.0), 0.5, weights=(1.0, -0.5))
    assert estimate.terms == ((1, 3.0), (2, -1.5))
    assert replace(estimate, weights=()).terms == ((1, 3.0), (2, 3.0))
    optimizer, _ = optimizer_of(3, lr=1.0, update=None)
    assert optimizer._make_step(optimizer.memory, estimate).terms == ((1, (-1.5,)), (2, (0.75,)))
