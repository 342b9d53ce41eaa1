"""Two-point estimates: SPSA, the rule of MeZO."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_lightning.estimators.base import Antithetic, Estimator
from mezo_lightning.estimators.checks import check_probes
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.steps import GradientEstimate, round_coefficient


@dataclass(frozen=True)
class CentralDifference(Estimator):
    """Two-point estimates along random directions: SPSA, as in MeZO; n-SPSA with several queries.

    ``g_i = (L(theta + epsilon z_i) - L(theta - epsilon z_i)) / (2 epsilon)``, and the estimate is the mean of
    ``g_i z_i`` over the queries (Spall, 1992; Malladi et al., 2023, arXiv 2305.17333, definition 1 and algorithm 2).
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed. It depends on what is tuned: 1e-3 is usual for all parameters,
    1e-2 for LoRA, and 1e-1 or far more for prefixes; `mezo tune` measures it."""
    num_queries: int = 1
    """Directions per step; each costs two forward passes."""

    def __post_init__(self) -> None:
        check_probes(self.epsilon, self.num_queries)

    @property
    def scalar_meaning(self) -> str:
        return "How fast the objective changes along a random direction: (at +epsilon, less at -epsilon) / 2 epsilon."

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        epsilon = round_coefficient(self.epsilon)
        probes = Antithetic.of(seed, epsilon, self.num_queries)
        evaluation = evaluate(probes.points)
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=probes.pairs, skipped=evaluation.skip_reason)
        means = evaluation.means
        projected_grads = tuple((means[plus] - means[minus]) / (2 * epsilon) for plus, minus in probes.pairs)
        return GradientEstimate(probes.seeds, projected_grads, 1 / self.num_queries, evaluation, probes.pairs)
