"""Everything is coefficients on seeded directions: the three scalar-sized objects that the parts exchange.

    Point            = theta + sum_j c_j z(s_j)                       where an objective is evaluated
    GradientEstimate = scale * sum_i g_i w_i z(s_i)                   what an estimator returns: O(q) scalars
    Step             : theta <- theta - decay * theta + sum_i c_i z(s_i)      what the optimizer applies and records

Coefficients are kept to 12 significant bits, as directions are: a product c * z is then exact in fp32 and a sum is
rounded once, so that fused and unfused arithmetic, and any device, give the same bits.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mezo_lightning.samplers import SIGNIFICANT_BITS

if TYPE_CHECKING:
    from mezo_lightning.dense import Dense
    from mezo_lightning.evaluators import Evaluation

DecayTowards = Literal["zero", "start"]

_LARGEST_EXPONENT = 100  # |c| < 2^100, and |c| < 2^-100 becomes 0: products stay normal fp32 numbers


def round_coefficient(value: float) -> float:
    """The nearest number with 12 significant bits; magnitudes below 2^-100 become 0.

    Raises:
        ValueError: If the value is not finite, or is 2^100 or more.
    """
    if not math.isfinite(value) or abs(value) >= 2.0**_LARGEST_EXPONENT:
        raise ValueError(f"coefficient {value} is not a finite number below 2^{_LARGEST_EXPONENT}")
    mantissa, exponent = math.frexp(value)
    if exponent < -_LARGEST_EXPONENT:
        return 0.0
    return math.ldexp(round(mantissa * 2**SIGNIFICANT_BITS), exponent - SIGNIFICANT_BITS)


def round_fp32(value: float) -> float:
    """The nearest fp32 number."""
    return struct.unpack("<f", struct.pack("<f", value))[0]


@dataclass(frozen=True)
class Point:
    """A place where the objective is evaluated: theta plus ``terms`` of (seed, coefficient)."""

    terms: tuple[tuple[int, float], ...] = ()
    label: str = field(default="theta", compare=False)

    def __post_init__(self) -> None:
        rounded = tuple((seed, round_coefficient(coefficient)) for seed, coefficient in self.terms)
        object.__setattr__(self, "terms", tuple(term for term in rounded if term[1]))


@dataclass(frozen=True)
class GradientEstimate:
    """``scale * sum_i projected_grads[i] * weights[i] * z(seeds[i])``; an empty one is a skipped step."""

    seeds: tuple[int, ...] = ()
    projected_grads: tuple[float, ...] = ()
    scale: float = 1.0
    evaluation: Evaluation | None = None
    """The values that the estimate was made from, for logs."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Which points of the evaluation were compared with one another, for logs."""
    skipped: str | None = None
    """Why there is no estimate, where there is none."""
    earlier: tuple[Evaluation, ...] = ()
    """The rounds before the last one, ``evaluation``: what decided on the directions, for logs."""
    weights: tuple[float, ...] = ()
    """Of each direction in a sum that was probed as one, which transforms must not turn; none: 1.0 for all."""

    def __post_init__(self) -> None:
        assert len(self.seeds) == len(self.projected_grads), (self.seeds, self.projected_grads)
        assert len(self.weights) in (0, len(self.seeds)), (self.seeds, self.weights)

    @property
    def terms(self) -> tuple[tuple[int, float], ...]:
        """(seed, projected gradient times weight) of each direction, to be multiplied by ``scale``."""
        weights = self.weights or (1.0,) * len(self.seeds)
        return tuple((s, g * w) for s, g, w in zip(self.seeds, self.projected_grads, weights, strict=True))


@dataclass(frozen=True)
class Step:
    """One update of the weights, with a coefficient and a decay for each parameter group.

    ``theta_k <- theta_k - decays[k] * theta_k + sum_i terms[i][1][k] * z(terms[i][0])`` for the parameters of group k,
    in fp32, in the order of the terms. A step without terms changes nothing. Where decay is towards the start, it is
    ``decays[k] * (theta_k - start_k)`` that is subtracted. Where a rule keeps dense moments, the sum is the gradient
    that it takes in, and what is added is ``-rates[k]`` times what it makes of that.
    """

    terms: tuple[tuple[int, tuple[float, ...]], ...] = ()
    decays: tuple[float, ...] = ()
    number: int = field(default=0, compare=False)
    """How many steps the run made before this one; it decides on the random bits of rounding."""
    decay_towards: DecayTowards = "zero"
    """Zero, or the ``start``: the weights before step number 0."""
    rule: Dense | None = None
    """Keeps dense moments, if there is one."""
    rates: tuple[float, ...] = ()
    """Of each parameter group, where there is such a rule."""

    def rms(self, numels: Sequence[int]) -> float | None:
        """The root mean square change of a weight by the sum, for independent directions of unit variance.

        Args:
            numels: The number of weights in each parameter group.

        Returns:
            The change; None where a rule keeps dense moments, for coefficients do not tell it then.
        """
        if self.rule is not None:
            return None
        squares = math.fsum(
            numel * c * c for _, coefficients in self.terms for numel, c in zip(numels, coefficients, strict=True)
        )
        return math.sqrt(squares / sum(numels))

    @property
    def changes_nothing(self) -> bool:
        """Whether applying the step would leave every weight and moment as it is, bit for bit."""
        if self.rule is not None:
            return not self.terms
        return not self.terms or not (any(self.decays) or any(any(c) for _, c in self.terms))
