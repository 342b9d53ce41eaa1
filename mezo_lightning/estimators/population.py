"""An evolution strategy's population: every member's value counts relative to the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Literal

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import are_tied, check_count, check_epsilon
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point, round_coefficient


@dataclass(frozen=True)
class Population(Estimator):
    """An evolution strategy (Salimans et al., 2017, arXiv 1703.03864; at scale: Qiu et al., 2025, arXiv 2509.24372).

    With ``l_i = L(theta + epsilon z_i)`` for N members, the estimate is the mean of ``w_i z_i``, where the weights w_i
    are the z-scores of the values, ``(l_i - mean(l)) / std(l)`` (std divides by N), or their centred ranks, from -1/2
    for the lowest to 1/2 for the highest. Antithetic members come in pairs along z and -z, and the mean is taken over
    all N of them.

    As published, nothing is divided by epsilon: the learning rate is in units of a step that does not depend on the
    scale of the objective. The root mean square change of a coordinate is about ``lr / sqrt(N)`` with z-scores, whose
    squares add up to N, and 0.29 times that with ranks. Antithetic members make it sqrt(2) times as large where the
    objective is about linear over epsilon: the two weights of a pair are then opposite, and each of the N / 2
    directions counts twice. For all parameters Qiu et al. take ``lr = epsilon / 2``. In expectation the estimate points
    along the gradient; its length says nothing about it. Deviations: members that tie share the mean of their ranks, so
    that a tie is no signal; a step in which all members tie is skipped, where others add 1e-8 to std.
    """

    epsilon: float = 1e-3
    """How far from the weights the members are: the standard deviation sigma of evolution strategies."""
    population_size: int = 30
    """Members per step, N; each costs one forward pass."""
    antithetic: bool = False
    """Whether members come in pairs along z and -z; the size must then be even."""
    fitness: Literal["z_score", "centered_rank"] = "z_score"
    """What a member's value becomes: its z-score, or its rank, which an outlier cannot dominate."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_count("population_size", self.population_size, 2, even=self.antithetic)
        if self.fitness not in ("z_score", "centered_rank"):
            raise ValueError(f"fitness={self.fitness!r} must be 'z_score' or 'centered_rank'")

    @property
    def scalar_meaning(self) -> str:
        weight = "z-score" if self.fitness == "z_score" else "centred rank"
        less = ", less that of the member on the other side" if self.antithetic else ""
        return f"The {weight} of the objective of a member of the population{less}."

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        epsilon, ways = round_coefficient(self.epsilon), (1.0, -1.0) if self.antithetic else (1.0,)
        seeds = tuple(derive_seed(seed, query) for query in range(self.population_size // len(ways)))
        evaluation = evaluate(
            [
                Point(((s, way * epsilon),), label=f"q{query}{'+' if way > 0 else '-'}")
                for query, s in enumerate(seeds)
                for way in ways
            ]
        )
        # Every member is compared with all others; for logs, neighbours or the two along one direction stand for that.
        pairs = tuple((i, i + 1) for i in range(0, self.population_size - 1, len(ways)))
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=evaluation.skip_reason)
        values = evaluation.means
        if are_tied(values):
            reason = f"all {self.population_size} members of the population have the same value"
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=reason)
        weights = z_scores(values) if self.fitness == "z_score" else centered_ranks(values)
        members = [weights[at : at + len(ways)] for at in range(0, len(weights), len(ways))]
        projected_grads = tuple(sum(way * w for way, w in zip(ways, pair, strict=True)) for pair in members)
        return GradientEstimate(seeds, projected_grads, 1 / self.population_size, evaluation, pairs)


def z_scores(values: Sequence[float]) -> list[float]:
    """Values less their mean, divided by their standard deviation, which must not be 0.

    Args:
        values: At least two numbers.
    """
    mean, spread = fmean(values), pstdev(values)
    return [(value - mean) / spread for value in values]


def centered_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from -1/2 for the lowest value to 1/2 for the highest; equal values share the mean of their ranks.

    Args:
        values: At least two numbers.
    """
    ordered = sorted(values)
    first = {value: rank for rank, value in reversed(list(enumerate(ordered)))}
    last = {value: rank for rank, value in enumerate(ordered)}
    return [(first[value] + last[value]) / (2 * (len(values) - 1)) - 0.5 for value in values]
