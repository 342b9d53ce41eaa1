"""Directions that are longer in some parameters than in others, by factors that the user names, or by their norms.

Like all directions they are pure functions of seed, step and position. Factors are powers of two, so that every element
keeps its 12 significant bits and products with coefficients stay exact.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.layout import BLOCKS, Layout, check_pattern
from mezo_lightning.magnitudes import sum_of_squares
from mezo_lightning.samplers import Directions, Gaussian, Sampler, check_inner

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo, Slice

_LARGEST_EXPONENT = 10  # a coefficient of 2^-100 times the smallest element is then still a normal fp32 number


@dataclass(frozen=True)
class Scaled(Sampler):
    """Directions ``z = s * z'`` of another sampler, with a scale s for each parameter.

    A parameter with scale s is probed s times as far away, and the mean estimate of its gradient is s^2 times what it
    would be: as if it had ``s^2 * lr`` for a learning rate and ``s * epsilon`` for an epsilon. (MeZO's paper, appendix
    B, tries perturbations scaled by layer as well, but undoes the scale in the update, or applies the plain z; here
    both have the same direction, as in every other step.) Where the layers' gradients or weights are known to differ in
    size, this is one step size for each of them; ``ScaledByNorm`` finds the scales itself.
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
            check_pattern("Scaled(scales)", pattern)
            _check_scale("Scaled", pattern, scale)
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

    @property
    def inner(self) -> Sampler:
        return self.sampler

    def seeded(self, seed: int) -> Scaled:
        return replace(self, sampler=self.sampler.seeded(seed))

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> Scaled:
        return replace(self, sampler=self.sampler.settled(slices, table))

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _ScaledDirections(self.sampler, table, self._scales_of)

    def _scales_of(self, table: Sequence[ParameterInfo]) -> list[float]:
        """The scale of each parameter.

        Raises:
            ValueError: If a pattern is found in no name.
        """
        for pattern in self.scales:
            if not any(re.search(pattern, info.name) for info in table):
                raise ValueError(f"Scaled(scales): {pattern!r} is found in the name of no trainable parameter")
        return [self._scale(info.name) for info in table]

    def _scale(self, name: str) -> float:
        return next((scale for pattern, scale in self.scales.items() if re.search(pattern, name)), 1.0)


@dataclass(frozen=True)
class ScaledByNorm(Sampler):
    """Directions ``z = s * z'`` of another sampler, with scales s that the norms of the blocks' weights decide.

    The larger the norm of a block, the smaller its scale, as in MeZO's paper (appendix B) and with ``param_norm`` in
    its code. There a block with norm c is perturbed by ``z' / c`` and, so that the mean estimate stays the gradient,
    updated along ``c z'``; or along the plain ``z'``, and it is the gradient divided by c. Here both are along ``z' /
    c``, as in every other step, and the mean estimate is the gradient divided by c^2, as with ``Scaled``.

    Other than published, moreover: scales are divided by what they have in common, so that directions are as long as
    those of the other sampler, and epsilon and lr keep their size; then they are rounded to powers of two, from 1/1024
    to 1024. Parameters of no block (embeddings, head, last norm) are a block for each module, where the published code
    has one for the embeddings and one for the head. A block of zeros has scale 1. Norms are those of the tuned weights,
    cut to the precision of bf16, and are not measured again on the way.

    The scales are found when the optimizer is built, of the weights as they are then: exactly, in one pass, and the
    same however these are cut up over processes. They are in the log and in checkpoints.
    """

    sampler: Sampler = Gaussian()  # noqa: RUF009  (frozen)
    """The directions that are scaled."""
    blocks: str = BLOCKS
    """A regular expression: what it finds in a parameter's name is the name of its block; else its module is."""
    scales: dict[str, float] | None = field(default=None, compare=False, repr=False)
    """The scale of each block by its name, a power of two; null: found from the weights, as said above."""

    def __post_init__(self) -> None:
        check_pattern("ScaledByNorm(blocks)", self.blocks)
        for block, scale in (self.scales or {}).items():
            _check_scale("ScaledByNorm", block, scale)
        check_inner("ScaledByNorm", self.sampler)

    @property
    def same_at_every_step(self) -> bool:
        return self.sampler.same_at_every_step

    @property
    def nearly_orthogonal(self) -> bool:
        return self.sampler.nearly_orthogonal

    @property
    def unit_variance(self) -> bool:
        return False

    @property
    def inner(self) -> Sampler:
        return self.sampler

    def seeded(self, seed: int) -> ScaledByNorm:
        return replace(self, sampler=self.sampler.seeded(seed))

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> ScaledByNorm:
        scales = self.scales
        if scales is None:
            own = {piece.info.start: piece for piece in slices}
            members: dict[str, list[tuple[int, float]]] = {}
            for info in table:
                squares = sum_of_squares(own[info.start], advice="ScaledByNorm: give scales")
                members.setdefault(self._block(info.name), []).append((info.numel, squares))
            scales = _scales_by_norm(
                {block: (sum(n for n, _ in some), math.fsum(s for _, s in some)) for block, some in members.items()}
            )
        for info in table:
            if self._block(info.name) not in scales:
                raise ValueError(
                    f"ScaledByNorm(scales) has no scale for {self._block(info.name)!r}, the block of {info.name!r}: "
                    "give one for every block that is tuned, or none at all"
                )
        return replace(self, sampler=self.sampler.settled(slices, table), scales=scales)

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _ScaledDirections(self.sampler, table, self._scales_of)

    def _scales_of(self, table: Sequence[ParameterInfo]) -> list[float]:
        assert self.scales is not None, "a space of parameters settles its sampler before it binds it"
        return [self.scales[self._block(info.name)] for info in table]

    def _block(self, name: str) -> str:
        found = re.search(self.blocks, name)
        return found.group() if found else name.rpartition(".")[0] or name


class _ScaledDirections(Directions):
    def __init__(
        self,
        inner: Sampler,
        table: Sequence[ParameterInfo],
        scales_of: Callable[[Sequence[ParameterInfo]], Sequence[float]],
    ):
        self._layout = Layout(table)
        self._inner = inner.bind(table)
        self._scales_of = scales_of

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
        """The scale of each parameter, by its position: found only now, for a trial run of the settings has none."""
        table = self._layout.table
        return {info.start: scale for info, scale in zip(table, self._scales_of(table), strict=True)}


def _scales_by_norm(blocks: Mapping[str, tuple[int, float]]) -> dict[str, float]:
    """Powers of two near ``a / c`` for norms c, with the a that makes directions as long as they are without scales.

    Only sums and quotients decide, which are the same on every machine, and of their results only the exponents.

    Args:
        blocks: The number of weights of each block, and the sum of their squares.
    """
    for block, (_, squares) in blocks.items():
        if not math.isfinite(squares):
            raise ValueError(f"ScaledByNorm: some weights of {block!r} are not finite")
    known = {block: (numel, squares) for block, (numel, squares) in blocks.items() if squares}
    if not known:
        return dict.fromkeys(blocks, 1.0)
    common = sum(numel for numel, _ in known.values()) / math.fsum(numel / squares for numel, squares in known.values())
    scales = dict.fromkeys(blocks, 1.0)
    for block, (_, squares) in known.items():
        # 2^k is nearest, by ratio, to the root of what lies from 2^(2k - 1) to 2^(2k + 1).
        exponent = math.frexp(common / squares)[1] // 2
        scales[block] = 2.0 ** max(-_LARGEST_EXPONENT, min(exponent, _LARGEST_EXPONENT))
    return scales


def _check_scale(sampler: str, pattern: str, scale: float) -> None:
    if not (math.isfinite(scale) and 2.0**-_LARGEST_EXPONENT <= scale <= 2.0**_LARGEST_EXPONENT):
        raise ValueError(f"{sampler}(scales={{{pattern!r}: {scale}}}) must be a power of two from 1/1024 to 1024")
    mantissa, exponent = math.frexp(scale)
    if mantissa != 0.5:
        below, above = math.ldexp(0.5, exponent), math.ldexp(0.5, exponent + 1)
        raise ValueError(
            f"{sampler}(scales={{{pattern!r}: {scale}}}) must be a power of two, so that directions keep their bits: "
            f"take {below:g} or {above:g}"
        )
