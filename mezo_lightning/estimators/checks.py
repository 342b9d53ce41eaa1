"""Checks that the estimators share: of their options, and of the spread of values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mezo_lightning.steps import round_coefficient

_RESOLUTION = 2.0**-40  # relative; means of fp64 values that are equal on paper differ by less


def check_epsilon(epsilon: float) -> None:
    """Refuse what is no distance.

    Args:
        epsilon: How far from the weights the objective is to be probed.

    Raises:
        ValueError: If it is not a positive number, or too small for a coefficient.
    """
    if not (math.isfinite(epsilon) and round_coefficient(epsilon) > 0):
        raise ValueError(f"epsilon={epsilon} must be a positive number, such as 1e-3")


def check_count(name: str, value: int, least: int, *, even: bool = False) -> None:
    """Refuse a number of points that a rule cannot work with.

    Args:
        name: The option.
        value: What it was set to.
        least: The smallest number that will do.
        even: Whether the number must be even.

    Raises:
        ValueError: If it will not do.
    """
    if value < least or (even and value % 2):
        raise ValueError(f"{name}={value} must be {'an even number, ' if even else ''}at least {least}")


def check_probes(epsilon: float, num_queries: int, least: int = 1) -> None:
    """Refuse probes that cannot be made.

    Args:
        epsilon: See ``check_epsilon``.
        num_queries: Directions per step.
        least: The smallest number of them that will do.

    Raises:
        ValueError: If epsilon is no distance, or there are too few queries.
    """
    check_epsilon(epsilon)
    check_count("num_queries", num_queries, least)


def are_tied(values: Sequence[float]) -> bool:
    """Whether values do not differ by more than fp64 rounding: dividing by their spread would then blow up noise.

    Args:
        values: The objective at several points, finite.
    """
    return max(values) - min(values) <= _RESOLUTION * max(map(abs, values))
