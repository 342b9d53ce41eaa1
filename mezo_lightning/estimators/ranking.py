"""Estimates from an order: which of several points are better than which others, and not by how much."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import check_count, check_epsilon
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point


@dataclass(frozen=True)
class Ranking(Estimator):
    """Follows the order of several points (ZO-RankSGD, Tang et al., 2023, arXiv 2303.03751), by comparisons alone.

    The points are ``theta + epsilon z_i``. With the mean vote ``p_ij`` of the samples on points i and j (1 if i is
    better, -1 if j is, 0 for a tie, ``2 P - 1`` for a probability P that i is), the estimate is the mean of
    ``p_ij (z_j - z_i)`` over all pairs: a direction counts by how many others are better than it, less how many are
    worse. A pair on which no sample has an opinion has no part in the mean.

    Comparisons come from a ``PreferenceObjective``, whose oracle is asked about every pair; with any other objective
    the smaller value of a sample is the better one. With a single sample the estimate is 4 times that of
    ``Population`` with ``fitness: centered_rank``; of several, each has a ranking of its own. As published, nothing is
    divided by epsilon: the learning rate does not depend on the scale of a reward. Deviations: the whole order counts,
    where an (m, k) oracle tells that of the k best; it is asked for pair by pair, so that an oracle may contradict
    itself.
    """

    epsilon: float = 1e-3
    """How far from the weights samples are made; as for ``Comparison``."""
    num_points: int = 4
    """Points per step, m, each in a direction of its own; a step costs m forward passes, and m (m - 1) / 2 comparisons
    for each sample."""

    def __post_init__(self) -> None:
        check_epsilon(self.epsilon)
        check_count("num_points", self.num_points, 2)

    @property
    def needs_values(self) -> bool:
        return False

    @property
    def scalar_meaning(self) -> str:
        return (
            "How many of a step's other points are better than the one along a direction, less how many are worse, by "
            "the mean vote of the samples."
        )

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        seeds = tuple(derive_seed(seed, query) for query in range(self.num_points))
        pairs = tuple(combinations(range(self.num_points), 2))
        points = [Point(((s, self.epsilon),), label=f"q{query}+") for query, s in enumerate(seeds)]
        evaluation = evaluate(points).compared(pairs)
        if evaluation.skip_reason:
            return GradientEstimate(evaluation=evaluation, pairs=pairs, skipped=evaluation.skip_reason)
        projected_grads, answered = [0.0] * self.num_points, 0
        for (one, other), vote in zip(pairs, evaluation.mean_preferences, strict=True):
            if not math.isnan(vote):
                projected_grads[one] -= vote
                projected_grads[other] += vote
                answered += 1
        return GradientEstimate(seeds, tuple(projected_grads), 1 / answered, evaluation, pairs)
