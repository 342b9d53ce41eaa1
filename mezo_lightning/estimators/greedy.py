"""MeZO-Greedy: the best of a pool of candidate directions."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import check_count, check_epsilon
from mezo_lightning.estimators.pool import Pool
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.steps import GradientEstimate, round_coefficient


@dataclass(frozen=True)
class GreedyDirection(Estimator):
    """MeZO-Greedy: a two-point estimate along the best candidate (Jin, Cen and Tan, 2026, arXiv 2601.04710, eq. 7).

    Of M candidates z_i, v is the one with the lowest ``L(theta + epsilon z_i)`` on the same batch, and the estimate is
    ``g v`` with ``g = (L(theta + epsilon v) - L(theta - epsilon v)) / (2 epsilon)``.

    It is biased on purpose: where the objective is linear, the expected estimate is the gradient times 1.00, 1.55, 2.40
    for M = 2, 4, 8, which is also the squared alignment with the gradient relative to MeZO's. MeZO with
    ``num_queries = M / 2 + 1``, at the same cost, gains 2, 3, 5. Deviation: a pool that ties throughout is a skipped
    step.
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed, along candidates and along v; as for CentralDifference."""
    pool_size: int = 4
    """Candidates per step, M; a step costs M + 2 forward passes."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_count("pool_size", self.pool_size, 2)

    @property
    def scalar_meaning(self) -> str:
        return (
            "How fast the objective changes along the best candidate direction: (at +epsilon, less at -epsilon) / "
            "2 epsilon; one slope a step."
        )

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        epsilon = round_coefficient(self.epsilon)
        pool = Pool.of(evaluate, seed, epsilon, self.pool_size)
        if pool.skipped:
            return pool.estimate()
        return pool.estimate_along(evaluate, pool.best_first[:1], (1.0,), 1.0, epsilon)
