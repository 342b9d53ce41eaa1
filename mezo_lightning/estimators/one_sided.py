"""One-sided estimates: every direction is compared with the weights as they are."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import check_probes
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point, round_coefficient


@dataclass(frozen=True)
class ForwardDifference(Estimator):
    """One-sided estimates along random directions: one forward pass a direction, and one for the weights themselves.

    ``g_i = (L(theta + epsilon z_i) - L(theta)) / epsilon``, and the estimate is the mean of ``g_i z_i`` over the
    queries (Nesterov and Spokoiny, 2017, "Random gradient-free minimization of convex functions").

    Its mean over directions is that of ``CentralDifference``, because z and -z are equally likely: the gradient of the
    smoothed objective. Each g_i has an error of ``epsilon / 2 * z' H z`` on top, which is the trace of the Hessian,
    times epsilon / 2, in every direction; with few queries, choose epsilon smaller than for the central difference.
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed; as for CentralDifference, or smaller."""
    num_queries: int = 1
    """Directions per step; a step costs one forward pass more than that."""

    def __post_init__(self) -> None:
        check_probes(self.epsilon, self.num_queries)

    @property
    def scalar_meaning(self) -> str:
        return "How fast the objective changes along a random direction: (at +epsilon, less at the weights) / epsilon."

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        epsilon = round_coefficient(self.epsilon)
        seeds = tuple(derive_seed(seed, query) for query in range(self.num_queries))
        evaluation = evaluate([Point(), *(Point(((s, epsilon),), label=f"q{query}+") for query, s in enumerate(seeds))])
        pairs = tuple((query, 0) for query in range(1, self.num_queries + 1))
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=evaluation.skip_reason)
        here, *there = evaluation.means
        projected_grads = tuple((value - here) / epsilon for value in there)
        return GradientEstimate(seeds, projected_grads, 1 / self.num_queries, evaluation, pairs)
