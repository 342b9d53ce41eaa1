"""What an estimator is, and what those that look both ways along their directions share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo_lightning.evaluators import Evaluate
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import GradientEstimate, Point

if TYPE_CHECKING:
    from mezo_lightning.optimizer import MeZO


class Estimator(ABC):
    """A rule that turns values of the objective at chosen points into a gradient estimate."""

    epsilon: float
    """How far from the weights the objective is probed."""

    @property
    def needs_values(self) -> bool:
        """Whether it needs a value at each point; False where it is enough to know which of two points is better."""
        return True

    @property
    def scalar_meaning(self) -> str:
        """What one of its projected gradients is: a sentence for people who read a report."""
        return "What the estimate multiplies a direction by."

    @property
    def one_slope(self) -> bool:
        """Whether the projected gradients of a step are all one slope, with the signs of the terms of its direction."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether each row of a batch is probed along a direction of its own, by a process that holds all weights."""
        return False

    def knowing(self, optimizer: MeZO) -> Estimator:
        """This rule for the next step of an optimizer, where it depends on what that remembers of earlier ones.

        Args:
            optimizer: Applies the estimates.

        Raises:
            ValueError: If it does not remember what the rule needs, or has other directions than that can use.
        """
        del optimizer
        return self

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
class Antithetic:
    """Probes on both sides of theta: ``theta + epsilon z_i`` and ``theta - epsilon z_i`` for each query i."""

    seeds: tuple[int, ...]
    """Of the directions z_i."""
    points: tuple[Point, ...]
    """Two for each direction: q0+, q0-, q1+, ..."""
    pairs: tuple[tuple[int, int], ...]
    """Which points belong together, the positive side first."""

    @staticmethod
    def of(seed: int, epsilon: float, num_queries: int) -> Antithetic:
        """Probes along directions that are derived from a step's seed."""
        seeds = tuple(derive_seed(seed, query) for query in range(num_queries))
        points = tuple(
            Point(((s, sign * epsilon),), label=f"q{query}{'+' if sign > 0 else '-'}")
            for query, s in enumerate(seeds)
            for sign in (1.0, -1.0)
        )
        return Antithetic(seeds, points, tuple((2 * query, 2 * query + 1) for query in range(num_queries)))
