"""Samplers on record: the name and settings of each, as plain values for the log and for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from mezo_lightning.flipout import Flipout
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler
from mezo_lightning.scaled import Scaled, ScaledByNorm
from mezo_lightning.sparse import Sparse
from mezo_lightning.structured import LowRank, Subset

_SAMPLERS: dict[str, type[Sampler]] = {
    kind.__name__: kind for kind in (Gaussian, Rademacher, LowRank, Subset, Flipout, Scaled, ScaledByNorm, Sparse)
}


def sampler_as_dict(sampler: Sampler) -> dict[str, Any]:
    """A sampler's name and settings, for JSON."""
    assert is_dataclass(sampler), sampler
    settings = {field.name: getattr(sampler, field.name) for field in fields(sampler)}
    return {"name": type(sampler).__name__, **{key: _as_plain(value) for key, value in settings.items()}}


def sampler_from_dict(record: Mapping[str, Any]) -> Sampler:
    """The inverse of ``sampler_as_dict``; names of strangers are not imported.

    Raises:
        ValueError: If the name is unknown.
    """
    settings = dict(record)
    name = settings.pop("name")
    if name not in _SAMPLERS:
        raise ValueError(f"the trajectory's sampler {name!r} is unknown; known are {', '.join(_SAMPLERS)}")
    return _SAMPLERS[name](**{key: _from_plain(value) for key, value in settings.items()})


def _as_plain(value: Any) -> Any:
    """A setting for JSON: a sampler as an object, a table as pairs, whose order no tool loses."""
    if isinstance(value, Sampler):
        return sampler_as_dict(value)
    return [list(pair) for pair in value.items()] if isinstance(value, Mapping) else value


def _from_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sampler_from_dict(value)
    return dict(value) if isinstance(value, list) else value
