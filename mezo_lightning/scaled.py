"""Directions that are longer in some parameters than in others, by factors that the user names.

Like all directions they are pure functions of seed, step and position. Factors are powers of two, so that every element
keeps its 12 significant bits and products with coefficients stay exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.layout import Layout
from mezo_lightning.samplers import Directions, Gaussian, Sampler, check_inner

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo

_LARGEST_EXPONENT = 10  # a coefficient of 2^-100 times the smallest element is then still a normal fp32 number


@dataclass(frozen=True)
class Scaled(Sampler):
    """Directions ``z = s * z'`` of another sampler, with a scale s for each parameter.

    A parameter with scale s is probed s times as far away, and the mean estimate of its gradient is s^2 times what it
    would be: as if it had ``s^2 * lr`` for a learning rate and ``s * epsilon`` for an epsilon. (MeZO's paper, appendix
    B, tries perturbations scaled by layer as well, but undoes the scale in the update, or applies the plain z; here
    both have the same direction, as in every other step.) Where the layers' gradients or weights are known to differ in
    size, this is one step size for each of them; no rule here finds the scales.
    """

    scales: dict[str, float] = field(hash=False)
    """Regular expressions and scales, such as {'embed': 0.25, 'layers\\.0\\.': 2}: a parameter has the scale of the
    first one that is found in its name, 1 where none is. Scales are powers of two, from 1/1024 to 1024."""
    sampler: Sampler = Gaussian()  # noqa: RUF009  (frozen)
    """The directions that are scaled."""

    def __post_init__(self) -> None:
        if not self.scales:
            raise ValueError("Scaled(scales={}) scales nothing: name some parameters, or use its sampler alone")
        for pattern, scale in self.scales.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Scaled(scales): {pattern!r} is no regular expression: {error}") from error
            _check_scale(pattern, scale)
        check_inner("Scaled", self.sampler)

    @property
    def same_at_every_step(self) -> bool:
        return self.sampler.same_at_every_step

    @property
    def nearly_orthogonal(self) -> bool:
        return self.sampler.nearly_orthogonal

    @property
    def unit_variance(self) -> bool:
        return False

    def seeded(self, seed: int) -> Scaled:
        return replace(self, sampler=self.sampler.seeded(seed))

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _ScaledDirections(self, table)


class _ScaledDirections(Directions):
    def __init__(self, config: Scaled, table: Sequence[ParameterInfo]):
        self._config = config
        self._layout = Layout(table)
        self._inner = config.sampler.bind(table)

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        self._inner.fill(out, seed, start, number)
        for info, begin, end in self._layout.runs(start, start + out.numel()):
            scale = self._scale_of[info.start]
            if scale != 1.0:
                out[info.start + begin - start : info.start + end - start].mul_(scale)
        return out

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        scale = self._scale_of[self._layout.at(int(starts[0])).start]
        rows = self._inner.rows(seed, starts, width, number)
        return rows if scale == 1.0 else torch.mul(rows, scale)

    @cached_property
    def _scale_of(self) -> dict[int, float]:
        """The scale of each parameter, by its position.

        Raises:
            ValueError: If a pattern is found in no name: only now, for a trial run of the settings has no parameters.
        """
        table = self._layout.table
        for pattern in self._config.scales:
            if not any(re.search(pattern, info.name) for info in table):
                raise ValueError(f"Scaled(scales): {pattern!r} is found in the name of no trainable parameter")
        return {info.start: self._scale(info.name) for info in table}

    def _scale(self, name: str) -> float:
        return next((scale for pattern, scale in self._config.scales.items() if re.search(pattern, name)), 1.0)


def _check_scale(pattern: str, scale: float) -> None:
    if not (math.isfinite(scale) and 2.0**-_LARGEST_EXPONENT <= scale <= 2.0**_LARGEST_EXPONENT):
        raise ValueError(f"Scaled(scales={{{pattern!r}: {scale}}}) must be a power of two from 1/1024 to 1024")
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        below, above = math.ldexp(0.5, exponent), math.ldexp(0.5, exponent + 1)
        raise ValueError(
            f"Scaled(scales={{{pattern!r}: {scale}}}) must be a power of two, so that directions keep their bits: "
            f"take {below:g} or {above:g}"
        )
