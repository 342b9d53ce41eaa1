"""The estimator GRZO: a direction for each row, against its equation, and how well it aligns with the gradient."""

import math
from collections.abc import Callable, Sequence
from functools import cache
from statistics import pstdev

import pytest
import torch
from torch import Tensor

from mezo_lightning import GRZO, Point, Samples
from mezo_lightning.evaluators import Evaluation
from mezo_lightning.rowwise.points import RowPoint, row_seed
from mezo_lightning.steps import round_coefficient

EPSILON = 2.0**-6


def rows_of(plus: list[float], minus: list[float], valid: list[bool] | None = None) -> Callable:
    """Values of rows on both sides of theta; a row is not valid on one side only."""
    mask = torch.tensor(valid or [True] * len(plus))[:, None]
    sides = [Samples(torch.tensor(plus)[:, None], mask), Samples.of(torch.tensor(minus))]

    def evaluate(points: Sequence[Point]) -> Evaluation:
        return Evaluation.of(points, sides, 0.5)

    return evaluate


def test_one_round_asks_for_both_sides_of_every_row():
    asked = []

    def evaluate(points: Sequence[Point]) -> Evaluation:
        asked.append(points)
        return rows_of([1.0, 2.0], [0.0, 3.0])(points)

    GRZO(1e-3).estimate(evaluate, seed=5)
    [(plus, minus)] = asked
    assert isinstance(plus, RowPoint)
    assert isinstance(minus, RowPoint)
    assert plus.seed == minus.seed == 5
    assert plus.coefficient == -minus.coefficient == round_coefficient(1e-3)
    assert (plus.label, minus.label) == ("rows+", "rows-")
    assert plus == RowPoint(5, 1e-3, "another name")
    assert plus != minus
    assert plus != Point()


@pytest.mark.parametrize("normalize", [True, False])
def test_the_equation(normalize: bool):
    plus, minus = [1.5, 2.0, 0.25], [1.0, 2.5, 0.0]
    estimate = GRZO(EPSILON, normalize=normalize).estimate(rows_of(plus, minus), seed=3)
    differences = [0.5, -0.5, 0.25]
    spread = pstdev(differences) if normalize else 1.0
    assert estimate.seeds == tuple(row_seed(3, row) for row in range(3))
    assert estimate.projected_grads == pytest.approx([d / spread / (2 * EPSILON) for d in differences])
    assert estimate.scale == 1 / 3
    assert estimate.pairs == ((0, 1),)


def test_a_row_without_a_value_has_no_part():
    estimate = GRZO(EPSILON).estimate(rows_of([1.5, 99.0, 0.25], [1.0, 0.0, 0.5], [True, False, True]), seed=3)
    assert estimate.seeds == (row_seed(3, 0), row_seed(3, 2))
    assert estimate.projected_grads == pytest.approx([0.5 / 0.375 / (2 * EPSILON), -0.25 / 0.375 / (2 * EPSILON)])
    assert estimate.scale == 1 / 2


def test_too_few_rows_are_a_skipped_step():
    estimate = GRZO(EPSILON).estimate(rows_of([1.0, 2.0, 3.0], [0.0] * 3, [True, False, False]), seed=3)
    assert estimate.seeds == ()
    assert "1 of 3 samples" in (estimate.skipped or "")


@pytest.mark.parametrize("difference", [0.0, 0.5])
def test_rows_without_spread_are_a_skipped_step(difference: float):
    evaluate = rows_of([1.0 + difference, 2.0 + difference], [1.0, 2.0])
    estimate = GRZO(EPSILON).estimate(evaluate, seed=3)
    assert estimate.seeds == ()
    assert estimate.skipped == "all 2 rows have the same difference: there is no spread to divide by"
    plain = GRZO(EPSILON, normalize=False).estimate(evaluate, seed=3)
    assert plain.projected_grads == pytest.approx([difference / (2 * EPSILON)] * 2)


def test_one_row_can_be_estimated_without_normalising():
    assert GRZO(EPSILON).estimate(rows_of([1.0], [0.5]), seed=0).skipped
    assert GRZO(EPSILON, normalize=False).estimate(rows_of([1.0], [0.5]), seed=0).projected_grads == (
        0.5 / 2 / EPSILON,
    )


@pytest.mark.parametrize("epsilon", [0.0, -1e-3, math.nan])
def test_bad_epsilon(epsilon: float):
    with pytest.raises(ValueError, match="epsilon="):
        GRZO(epsilon)


# -- alignment ---------------------------------------------------------------------------------------------------------

TRIALS, SIDE, ROWS = 1000, 24, 16


def gradients(agreement: float, generator: torch.Generator) -> Tensor:
    """[rows, SIDE^2]: gradients whose mean has this share of their mean squared length."""
    common = torch.randn(SIDE**2, generator=generator)
    own = torch.randn(ROWS, SIDE**2, generator=generator)
    own -= own.mean(0)
    common /= common.norm()
    own /= own.square().sum(1).mean().sqrt()
    return math.sqrt(agreement) * common + math.sqrt(1 - agreement) * own


@cache
def drawn() -> Tensor:
    """[trials, rows, SIDE^2]: the directions of each trial's rows."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randn(TRIALS, 1, SIDE, SIDE, generator=generator)
    left, right = torch.randint(0, 2, (2, TRIALS, ROWS, SIDE), generator=generator) * 2.0 - 1
    return (shared * left[..., None] * right[..., None, :]).flatten(2)


@pytest.mark.parametrize(("agreement", "gain"), [(0.05, 1.8), (0.2, 4.0), (0.5, 8.3), (1.0, 15.0)])
def test_the_squared_alignment_relative_to_mezo(agreement: float, gain: float):
    """On linear objectives of a 24 x 24 matrix, with 16 rows; MeZO's expected squared cosine is 1 / dimensions."""
    rows = gradients(agreement, torch.Generator().manual_seed(0))
    mean = rows.mean(0) / rows.mean(0).norm()
    directions = drawn()
    slopes = (directions * rows).sum(2).double() * EPSILON
    weights = []
    for up in slopes:
        estimate = GRZO(EPSILON).estimate(rows_of(up.tolist(), (-up).tolist()), seed=0)
        weights.append(estimate.projected_grads)
    dense = torch.einsum("tr,trd->td", torch.tensor(weights), directions)
    cosines = dense @ mean / dense.norm(dim=1)
    assert float(cosines.square().mean()) * SIDE**2 == pytest.approx(gain, rel=0.1)
