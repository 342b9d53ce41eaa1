"""Gradient estimates from values alone: which points to ask for, and what to make of the values.

An estimator never calls a model. It is handed ``evaluate``, which takes a round of points and returns their values,
and a seed, from which it derives the seeds of its directions; what it returns is a few scalars.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point, round_coefficient


class Estimator(ABC):
    """A rule that turns values of the objective at chosen points into a gradient estimate."""

    @abstractmethod
    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        """Estimate the gradient.

        Args:
            evaluate: Gives the values of the objective at a round of points.
            seed: This step's seed; all directions are derived from it.

        Returns:
            The estimate; an empty one, with the reason, where the values allow none.
        """


@dataclass(frozen=True)
class CentralDifference(Estimator):
    """Two-point estimates along random directions: SPSA, as in MeZO; n-SPSA with several queries.

    ``g_i = (L(theta + epsilon z_i) - L(theta - epsilon z_i)) / (2 epsilon)``, and the estimate is the mean of
    ``g_i z_i`` over the queries (Spall, 1992; Malladi et al., 2023, arXiv 2305.17333, definition 1 and algorithm 2).
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed; 1e-3 for all parameters, 1e-2 for LoRA, 1e-1 for prefixes."""
    num_queries: int = 1
    """Directions per step; each costs two forward passes."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and round_coefficient(self.epsilon) > 0):
            raise ValueError(f"epsilon={self.epsilon} must be a positive number, such as 1e-3")
        if self.num_queries < 1:
            raise ValueError(f"num_queries={self.num_queries} must be at least 1")

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        epsilon = round_coefficient(self.epsilon)
        seeds = tuple(derive_seed(seed, query) for query in range(self.num_queries))
        points = [
            Point(((s, sign * epsilon),), label=f"q{query}{'+' if sign > 0 else '-'}")
            for query, s in enumerate(seeds)
            for sign in (1.0, -1.0)
        ]
        evaluation = evaluate(points)
        pairs = tuple((2 * query, 2 * query + 1) for query in range(self.num_queries))
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=evaluation.skip_reason)
        means = evaluation.means
        projected_grads = tuple((means[plus] - means[minus]) / (2 * epsilon) for plus, minus in pairs)
        return GradientEstimate(seeds, projected_grads, 1 / self.num_queries, evaluation, pairs)
