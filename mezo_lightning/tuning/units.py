"""Which directions ``mezo tune`` measures along, and whether a run's learning rate is in the units of plain MeZO."""

from __future__ import annotations

from dataclasses import dataclass

from mezo_lightning.estimators import (
    GRZO,
    CentralDifference,
    Cone,
    Estimator,
    ForwardDifference,
    GreedyDirection,
    GuidingVector,
)
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler
from mezo_lightning.transforms import Identity, Transform
from mezo_lightning.updates import Trail


@dataclass(frozen=True)
class Units:
    """What the measurements of a run, and its learning rate, are in units of."""

    measured_along: str = "Gaussian()"
    """The distribution of the directions that everything is measured along."""
    sampler: str = "Gaussian()"
    """The run's own."""
    moves_all_alike: bool = True
    """Whether that moves all weights at every step, and all as far."""
    other_units: tuple[str, ...] = ()
    """The parts of the run that give its learning rate another unit than that of plain MeZO, as in its configuration:
    ``estimator: FZOO``."""


def independent(sampler: Sampler) -> Sampler:
    """A run's sampler, if its directions have independent coordinates of unit variance; otherwise ``Gaussian()``.

    Along directions of low rank, or with shared factors, or zero in some blocks, second differences show a smaller
    effective rank than the Hessian has.

    Args:
        sampler: The run's.
    """
    return sampler if isinstance(sampler, Gaussian | Rademacher) else Gaussian()


def units_of(optimizer: MeZO, estimator: Estimator, transform: Transform) -> Units:
    """What a run is measured in, and what it moves in.

    Args:
        optimizer: The run's.
        estimator: The run's.
        transform: The run's.
    """
    sampler, update = optimizer.space.sampler, optimizer.update
    parts = {
        "estimator": (estimator, _has_unit_of_mezo(estimator)),
        "transform": (transform, type(transform) is Identity),
        "update": (update, update is None or type(update) is Trail),  # Trail applies estimates as they are
    }
    other = tuple(f"{option}: {type(part).__name__}" for option, (part, same) in parts.items() if not same)
    return Units(repr(independent(sampler)), repr(sampler), sampler.unit_variance, other)


def _has_unit_of_mezo(estimator: Estimator) -> bool:
    """Whether its estimates are slopes times directions of MeZO's length; of a rule that is not known here, no."""
    if isinstance(estimator, GuidingVector):
        return estimator.match_norm or estimator.pool_size == 4
    if isinstance(estimator, GRZO):
        return not estimator.normalize
    return type(estimator) in (CentralDifference, ForwardDifference, GreedyDirection, Cone)
