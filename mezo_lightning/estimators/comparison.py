"""Two-point estimates from comparisons: which of the two points is better, and not by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mezo_lightning.estimators.base import Antithetic, Estimator
from mezo_lightning.estimators.checks import check_probes
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.steps import GradientEstimate


@dataclass(frozen=True)
class Comparison(Estimator):
    """Follows the directions whose samples are preferred, by the mean vote over the samples.

    ``g_i = -mean_n p_n(theta + epsilon z_i, theta - epsilon z_i)``, where sample n's preference ``p_n`` is 1 if its
    first point is better, -1 if its second one is, 0 for a tie, and ``2 P - 1`` for a probability P that the first is
    better; the estimate is the mean of ``g_i z_i`` over the queries. Samples without an opinion are left out.

    Comparisons come from a ``PreferenceObjective``; with any other objective, the smaller value of a sample is the
    better one, and g is the mean sign of the samples' differences. With a single sample this is the sign of the
    two-point difference (ZO-signSGD, Liu et al., 2019); with votes on completions see Zhang and Ying (2024, arXiv
    2409.17401). Nothing is divided by epsilon, so that the learning rate is the length of a step along a direction
    that all samples agree on, whatever the scale of a reward.
    """

    epsilon: float = 1e-3
    """How far from the weights samples are made; as for ``CentralDifference``, and larger where many samples tie."""
    num_queries: int = 1
    """Directions per step; each costs two forward passes and a comparison for each sample."""

    def __post_init__(self) -> None:
        check_probes(self.epsilon, self.num_queries)

    @property
    def needs_values(self) -> bool:
        return False

    @property
    def scalar_meaning(self) -> str:
        return "The mean vote of the samples along a random direction: -1 where all of them are better at +epsilon."

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        probes = Antithetic.of(seed, self.epsilon, self.num_queries)
        evaluation = evaluate(probes.points).compared(probes.pairs)
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=probes.pairs, skipped=evaluation.skip_reason)
        means = evaluation.mean_preferences
        answered = sum(not math.isnan(mean) for mean in means)  # other directions have no part in the estimate
        projected_grads = tuple(0.0 if math.isnan(mean) else 0.0 - mean for mean in means)
        return GradientEstimate(probes.seeds, projected_grads, 1 / answered, evaluation, probes.pairs)
