"""Directions that share one dense draw a step and differ in signs, so that a batch can have one for each row.

The sign flips of a matrix have rank one: a linear layer then runs along all of a batch's directions for the price of
one more product (Flipout: Wen et al., 2018, arXiv 1803.04386; as directions of zeroth-order steps: GRZO, Tan et al.,
2026, arXiv 2606.02857). Who runs a model so is ``rowwise``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.layout import Layout
from mezo_lightning.samplers import Directions, Gaussian, Rademacher, Sampler, check_inner, chunk_numel, derive_seed

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo, Slice

_SHARED = 0  # what a step's key is for
_Some = Callable[[slice], Tensor]


@dataclass(frozen=True)
class Flipout(Sampler):
    """Directions ``z = U * (r s^T)`` for every matrix and ``u * r`` for every vector, for the estimator ``GRZO``.

    ``U`` and ``u`` are drawn once a step, and all directions of the step share them; the signs ``r`` and ``s`` are each
    direction's own. Directions of one step are thus uncorrelated, though not independent: all have the same magnitudes.
    A parameter of more than two dimensions counts as a matrix of its first dimension by all the others.
    """

    sampler: Sampler = Gaussian()  # noqa: RUF009  (frozen)
    """The directions U that a step shares."""
    seed: int | None = None
    """Decides the shared directions, with the number of the step; null: the run's seed does, or 0 where there is no
    run."""

    def __post_init__(self) -> None:
        # The other way round GRZO would refuse it.
        check_inner(
            "Flipout",
            self.sampler,
            "GRZO, which Flipout is for, cannot be combined with such directions: make it of another sampler, or take "
            "another estimator",
        )

    @property
    def unit_variance(self) -> bool:
        return self.sampler.unit_variance

    @property
    def inner(self) -> Sampler:
        return self.sampler

    def seeded(self, seed: int) -> Flipout:
        return replace(self, sampler=self.sampler.seeded(seed), seed=seed if self.seed is None else self.seed)

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> Flipout:
        return replace(self, sampler=self.sampler.settled(slices, table))

    def bind(self, table: Sequence[ParameterInfo]) -> FlipoutDirections:
        return FlipoutDirections(self, table)


class FlipoutDirections(Directions):
    """``Flipout`` at work on one parameter table.

    The signs of a direction are one vector over all parameters, as long as their rows and columns together.

    Args:
        config: The distribution.
        table: Every parameter of the unsharded model, in the order of positions.
    """

    def __init__(self, config: Flipout, table: Sequence[ParameterInfo]):
        self._config = config
        self._layout = Layout(table)
        self._inner = config.sampler.bind(table)
        self._signs = Rademacher()
        self._first_sign: dict[int, int] = {}
        self.num_signs = 0
        """How many signs a direction has."""
        for info in table:
            self._first_sign[info.start] = self.num_signs
            self.num_signs += sum(_sides(info))
        self._kept: tuple[tuple[object, ...], Tensor] | None = None

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        shared = self._shared_chunk(out, start, number)
        runs = list(self._layout.runs(start, start + out.numel()))
        signs = self._signs_of_runs(runs, seed, out.device)
        for info, begin, end in runs:
            span = slice(info.start + begin - start, info.start + end - start)
            torch.mul(shared[span], self._sign_changes(info, begin, end, signs), out=out[span])
        return out

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        info = self._layout.at(int(starts[0]))
        at = (starts - info.start).div(width, rounding_mode="floor")
        rows, columns = self.sides(info)
        left = self._signs.rows(seed, at + rows.start, 1)
        right = self._fill_signs(seed, columns.start, width, starts.device)
        return self.shared_rows(starts, width, number).mul_(left).mul_(right)

    def shared(self, info: ParameterInfo, number: int, device: torch.device) -> Tensor:
        """U of a whole parameter in a step: fp32, in the parameter's shape."""
        out = torch.empty(info.numel, dtype=torch.float32, device=device)
        return self._inner.fill(out, self._key(number), info.start, number).view(info.shape)

    def shared_rows(self, starts: Tensor, width: int, number: int) -> Tensor:
        """U at several rows of one matrix: fp32 [rows, width] for int64 ``starts`` [rows]."""
        return self._inner.rows(self._key(number), starts, width, number)

    def signs(self, seeds: Sequence[int], device: torch.device) -> Tensor:
        """All signs of some directions: int8 [directions, num_signs]."""
        return torch.stack([self._fill_signs(seed, 0, self.num_signs, device).to(torch.int8) for seed in seeds])

    def sides(self, info: ParameterInfo) -> tuple[slice, slice]:
        """Which of its signs are those of a matrix's rows, and of its columns; a vector has rows only."""
        (rows, width), first = _sides(info), self._first_sign[info.start]
        return slice(first, first + rows), slice(first + rows, first + rows + width)

    def _signs_of_runs(self, runs: Sequence[tuple[ParameterInfo, int, int]], seed: int, device: torch.device) -> _Some:
        """Gives any signs of the parameters of a chunk; where they are many, all signs are drawn at once."""
        if len(runs) == 1:
            return lambda part: self._fill_signs(seed, part.start, part.stop - part.start, device)
        first, last = self.sides(runs[0][0])[0].start, self.sides(runs[-1][0])[1].stop
        signs = self._fill_signs(seed, first, last - first, device)
        return lambda part: signs[part.start - first : part.stop - first]

    def _sign_changes(self, info: ParameterInfo, begin: int, end: int, signs: _Some) -> Tensor:
        """The sign of each of a parameter's elements [begin, end)."""
        (rows, columns), (_, width) = self.sides(info), _sides(info)
        if not width:
            return signs(slice(rows.start + begin, rows.start + end))
        first, last = begin // width, (end - 1) // width + 1
        block = torch.outer(signs(slice(rows.start + first, rows.start + last)), signs(columns))
        return block.view(-1)[begin - first * width : end - first * width]

    def _shared_chunk(self, like: Tensor, start: int, number: int) -> Tensor:
        """U at as many positions; the last chunk is kept, because the update asks for it once for each direction."""
        key = (start, like.numel(), number, like.device)
        if self._kept is not None and self._kept[0] == key:
            return self._kept[1]
        shared = self._inner.fill(torch.empty_like(like), self._key(number), start, number)
        if like.numel() <= chunk_numel(like.device):
            self._kept = (key, shared)
        return shared

    def _fill_signs(self, seed: int, start: int, count: int, device: torch.device) -> Tensor:
        return self._signs.fill(torch.empty(count, dtype=torch.float32, device=device), seed, start)

    def _key(self, number: int) -> int:
        return derive_seed(self._config.seed or 0, _SHARED, number)


def _sides(info: ParameterInfo) -> tuple[int, int]:
    """How many rows and columns have signs; a vector has no columns."""
    if len(info.shape) < 2:
        return info.numel, 0
    return info.shape[0], info.numel // info.shape[0]
