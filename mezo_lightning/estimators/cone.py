"""ConMeZO: two-point estimates along directions that lean towards the momentum of earlier estimates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import check_epsilon
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point, round_coefficient
from mezo_lightning.updates import Trail

if TYPE_CHECKING:
    from mezo_lightning.optimizer import MeZO


@dataclass(frozen=True)
class Cone(Estimator):
    """ConMeZO: a two-point estimate along a direction on a cone around the momentum m (2025, arXiv 2511.02757).

    ``z = cos(angle) * sqrt(d) * m / |m| + sin(angle) * u``, where u is a random direction and d the number of weights,
    and the estimate is ``g z``, biased on purpose: once m points along the gradient, so does z, more than by chance. It
    costs what MeZO does in forward passes. At the first step there is no m, and z is u.

    The optimizer remembers m, with ``update: Trail``, as coefficients of seeded directions; there is no tensor. Random
    directions in many dimensions are nearly orthogonal and have length sqrt(d), so ``|m| = sqrt(d) * sqrt(sum_i
    c_i^2)`` but for a relative error of about 1 / sqrt(d), and nothing has to be measured. That needs directions which
    share no factor: a ``LowRank`` that keeps one for ever (TeZO) is refused.

    Other than published: m has the directions of a window of steps instead of all, for each of them is made again at
    every probe (see ``Trail``), and beta is not warmed up. The window limits what there is to gain: where the gradient
    never changes, z's squared alignment with it is 1.5 times that of a random direction at an angle of 1.35, and 2.3
    times at 1.0, with 20 directions (measured). As the terms of z differ in size, the direction that is applied is the
    one that was probed to the 12 bits of each coefficient, not to the last bit of their sum.
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed; as for CentralDifference."""
    angle: float = 1.35
    """Between z and m, in radians, above 0 and below pi / 2: the smaller, the more m decides."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        if not 0.0 < self.angle < math.pi / 2:
            raise ValueError(
                f"Cone(angle={self.angle}) must be above 0 and below pi / 2, in radians, such as 1.35; at pi / 2 the "
                "rule would be CentralDifference"
            )

    def knowing(self, optimizer: MeZO) -> Estimator:
        if not isinstance(optimizer.update, Trail):
            raise ValueError(
                f"estimator=Cone looks around the momentum of earlier estimates, and with update={optimizer.update} "
                "the optimizer does not remember it: give the optimizer `update: Trail`"
            )
        if not (sampler := optimizer.space.sampler).nearly_orthogonal:
            raise ValueError(
                "estimator=Cone knows how long its momentum is because directions of different seeds are nearly "
                f"orthogonal, and with sampler={sampler} they share a factor: give LowRank refresh_left: 0 and "
                "refresh_right: 0, or use Gaussian or Rademacher"
            )
        return _Aimed(self.epsilon, self.angle, optimizer.update.momentum(optimizer.memory))

    @property
    def scalar_meaning(self) -> str:
        return (
            "How fast the objective changes along a direction that leans towards the momentum: (at +epsilon, less at "
            "-epsilon) / 2 epsilon; one slope a step."
        )

    @property
    def one_slope(self) -> bool:
        return True

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        """As at the first step: around a momentum it is ``knowing(optimizer)`` that estimates."""
        return _Aimed(self.epsilon, self.angle).estimate(evaluate, seed=seed)


@dataclass(frozen=True)
class _Aimed(Estimator):
    """The rule around one momentum."""

    epsilon: float
    angle: float
    momentum: tuple[tuple[int, float], ...] = ()

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        terms, epsilon = self._direction(derive_seed(seed, 0)), round_coefficient(self.epsilon)
        ahead, back = (tuple((s, way * epsilon * weight) for s, weight in terms) for way in (1, -1))
        evaluation = evaluate([Point(ahead, label="z+"), Point(back, label="z-")])
        pairs = ((0, 1),)
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=evaluation.skip_reason)
        plus, minus = evaluation.means
        projected_grads = ((plus - minus) / (2 * epsilon),) * len(terms)
        seeds, weights = zip(*terms, strict=True)
        return GradientEstimate(seeds, projected_grads, 1.0, evaluation, pairs, weights=weights)

    def _direction(self, seed: int) -> list[tuple[int, float]]:
        """Z as (seed, weight) of each term, the new direction u first."""
        norm = math.sqrt(math.fsum(c * c for _, c in self.momentum))
        if not norm:
            return [(seed, 1.0)]
        lean = round_coefficient(math.cos(self.angle))  # rounded, for libraries differ in the last bit
        towards = [(s, round_coefficient(lean * c / norm)) for s, c in self.momentum]
        return [(seed, round_coefficient(math.sin(self.angle))), *(term for term in towards if term[1])]
