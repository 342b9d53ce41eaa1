"""Transforms of the projected gradients between the estimator and the optimizer.

They act on scalars, one for each direction, and compose with ``Chain``; "off" is ``Identity``. This is where gradient
clipping belongs: the gradient itself never exists.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mezo_lightning.steps import GradientEstimate


class Transform(ABC):
    """A rule on the projected gradients of one step."""

    @abstractmethod
    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        """The transformed projected gradients, in the same order."""

    def __call__(self, estimate: GradientEstimate) -> GradientEstimate:
        """The transformed estimate; a skipped one stays as it is."""
        return replace(estimate, projected_grads=self.scalars(estimate.projected_grads))


@dataclass(frozen=True)
class Identity(Transform):
    """Leaves the projected gradients as they are."""

    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        return projected_grads


@dataclass(frozen=True)
class Chain(Transform):
    """Applies several transforms, the first one first."""

    transforms: Sequence[Transform]
    """The transforms to apply."""

    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        for transform in self.transforms:
            projected_grads = transform.scalars(projected_grads)
        return projected_grads


@dataclass(frozen=True)
class Clip(Transform):
    """Limits the magnitude of each projected gradient, so that one bad batch cannot ruin the weights."""

    limit: float
    """The largest magnitude that is let through."""

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit={self.limit} must be positive")

    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(max(-self.limit, min(self.limit, g)) for g in projected_grads)


@dataclass(frozen=True)
class Standardize(Transform):
    """Divides the projected gradients of a step by their root mean square over the directions.

    The learning rate then sets the size of a step, whatever the scale of the reward. With a single direction only the
    sign is left. The mean is not subtracted: for differences it is signal, unlike the baseline of one-sided values.
    """

    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        size = math.sqrt(statistics.fmean(g * g for g in projected_grads)) if projected_grads else 0.0
        return tuple(g / size for g in projected_grads) if size else projected_grads


@dataclass(frozen=True)
class Sign(Transform):
    """Keeps the sign of each projected gradient (ZO-signSGD, Liu et al., 2019); a tie stays 0."""

    def scalars(self, projected_grads: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(math.copysign(1.0, g) if g else 0.0 for g in projected_grads)
