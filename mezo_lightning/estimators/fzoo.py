"""FZOO: one-sided probes whose spread sets the size of the step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import pstdev

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.checks import are_tied, check_probes
from mezo_lightning.estimators.one_sided import ForwardDifference
from mezo_lightning.evaluators import Evaluate
from mezo_lightning.steps import GradientEstimate


@dataclass(frozen=True)
class FZOO(Estimator):
    """One-sided probes, normalised by the standard deviation of their values (Dang et al., 2025, arXiv 2506.09034).

    With ``l_i = L(theta + epsilon z_i)`` for N directions and ``l_0 = L(theta)``, the estimate is the mean of
    ``(l_i - l_0) / std(l_1 .. l_N) * z_i``, where std divides by N: the forward difference ``g_i`` over the standard
    deviation of the g. As in the published code, and unlike the paper's text, epsilon is not left over. The learning
    rate is then in units of a step that does not depend on the scale of the objective; the root mean square change of
    a coordinate is ``lr / sqrt(N) * sqrt(1 + ((mean(l) - l_0) / std)^2)``.

    The paper's directions are ``Rademacher``, a choice of the optimizer's ``sampler``. Deviation: a step whose probes
    all tie, where the published code divides by zero, is skipped.
    """

    epsilon: float = 1e-3
    """How far from the weights the objective is probed; the authors use 1e-4 to 1e-3 for all parameters."""
    num_queries: int = 8
    """Directions per step, N; a step costs one forward pass more than that."""

    def __post_init__(self) -> None:
        check_probes(self.epsilon, self.num_queries, least=2)

    @property
    def scalar_meaning(self) -> str:
        return (
            "How much the objective differs at +epsilon along a random direction from what it is at the weights, in "
            "standard deviations of the step's probes."
        )

    def estimate(self, evaluate: Evaluate, *, seed: int) -> GradientEstimate:
        estimate = ForwardDifference(self.epsilon, self.num_queries).estimate(evaluate, seed=seed)
        if estimate.skipped or estimate.evaluation is None:
            return estimate
        if are_tied(estimate.evaluation.means[1:]) or are_tied(estimate.projected_grads):
            reason = f"all {self.num_queries} probes have the same value: there is no spread to divide by"
            return GradientEstimate(evaluation=estimate.evaluation, pairs=estimate.pairs, skipped=reason)
        spread = pstdev(estimate.projected_grads)
        return replace(estimate, projected_grads=tuple(g / spread for g in estimate.projected_grads))
