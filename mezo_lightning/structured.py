"""Directions with structure: low rank, or zero outside of some layers; pure functions of seed, step and position.

Like the plain samplers they give the same bits on every device, for every cut into shards and chunks. Nothing is kept
from step to step: what several steps share is drawn from a key that those steps share.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from mezo_lightning.layout import BLOCKS, Layout, check_pattern
from mezo_lightning.samplers import SIGNIFICANT_BITS, Directions, Gaussian, Sampler, check_inner, derive_seed

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo, Slice

_LEFT, _CORE, _RIGHT, _BLOCKS = range(4)  # what keys are for
_GRID = 64.0  # factors are multiples of 1/64: fp64 sums of their products are then exact, in any order


@dataclass(frozen=True)
class LowRank(Sampler):
    """Directions ``Z = U C V^T`` of low rank for every matrix, with entries of variance 1; vectors get dense ones.

    How often each factor is drawn anew makes it one of several methods of the field:

    - LOZO (Chen et al., 2024, arXiv 2410.07698): ``refresh_left: 0, refresh_right: 50``, rank 1 or 2;
    - EGGROLL (Sarkar et al., 2025): both 0;
    - SubZero (Yu et al., 2024, arXiv 2410.08989): ``core: dense`` and both 1000;
    - TeZO: ``core: diagonal`` and both null.

    Other than published: ``Z`` is scaled so that rank and form do not change the size of a step (LOZO's code has
    entries of variance ``rank``); factors are Gaussian numbers rounded to multiples of 1/64 and are not
    orthonormalised, since the result of a QR decomposition depends on the library and the machine; entries of ``Z``
    keep 12 significant bits.
    """

    rank: int = 2
    """Columns of the factors."""
    core: Literal["identity", "diagonal", "dense"] = "identity"
    """C, drawn anew for every direction: the identity, a diagonal, or a full rank x rank matrix."""
    refresh_left: int | None = 0
    """Steps for which U stays; 0: every direction has its own; null: for ever."""
    refresh_right: int | None = 50
    """Steps for which V stays; 0: every direction has its own; null: for ever."""
    seed: int | None = None
    """Decides the factors that several steps share; null: the run's seed does, or 0 where there is no run."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LowRank(rank={self.rank}) must be at least 1")
        for name, period in (("refresh_left", self.refresh_left), ("refresh_right", self.refresh_right)):
            if period is not None and period < 0:
                raise ValueError(f"LowRank({name}={period}) must be 0, a number of steps, or null for never")
        if self.core not in ("identity", "diagonal", "dense"):
            raise ValueError(f"LowRank(core={self.core!r}) is unknown; choose 'identity', 'diagonal' or 'dense'")
        if self.core == "identity" and self.refresh_left != 0 and self.refresh_right != 0:
            raise ValueError(
                "LowRank: with core='identity' all directions of a step would be the same one: set refresh_left or "
                "refresh_right to 0, or core to 'diagonal' or 'dense'"
            )

    @property
    def same_at_every_step(self) -> bool:
        return not self.refresh_left and not self.refresh_right

    @property
    def nearly_orthogonal(self) -> bool:
        return self.refresh_left == 0 and self.refresh_right == 0

    def seeded(self, seed: int) -> LowRank:
        return self if self.seed is not None else replace(self, seed=seed)

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _LowRankDirections(self, Layout(table))


class _LowRankDirections(Directions):
    def __init__(self, config: LowRank, layout: Layout):
        self._config = config
        self._layout = layout
        self._base = Gaussian()
        self._scale = 1.0 / (config.rank if config.core == "dense" else math.sqrt(config.rank))

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        for info, begin, end in self._layout.runs(start, start + out.numel()):
            part = out[info.start + begin - start : info.start + end - start]
            if len(info.shape) < 2:
                self._base.fill(part, seed, info.start + begin)
                continue
            width = info.numel // info.shape[0]
            first, last = begin // width, (end - 1) // width + 1
            rank = self._config.rank
            left = torch.empty((last - first) * rank, dtype=torch.float32, device=out.device)
            self._base.fill(left, self._key(_LEFT, seed, info, number), first * rank)
            block = self._product(left.view(-1, rank), info, width, seed, number)
            part.copy_(block.view(-1)[begin - first * width : end - first * width])
        return out

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        info = self._layout.at(int(starts[0]))
        rank = self._config.rank
        at = (starts - info.start).div(width, rounding_mode="floor")
        left = self._base.rows(self._key(_LEFT, seed, info, number), at * rank, rank)
        return self._product(left, info, width, seed, number).to(torch.float32)

    def _product(self, left: Tensor, info: ParameterInfo, width: int, seed: int, number: int) -> Tensor:
        """Rows of Z, fp64 [rows, width], for those rows of U."""
        rank, device = self._config.rank, left.device
        right = torch.empty(width * rank, dtype=torch.float32, device=device)
        self._base.fill(right, self._key(_RIGHT, seed, info, number), 0)
        factor = _on_grid(left)
        if self._config.core != "identity":
            core = torch.empty(rank * rank, dtype=torch.float32, device=device)
            core = _on_grid(self._base.fill(core, derive_seed(seed, _CORE, info.start), 0)).view(rank, rank)
            factor = factor * core.diagonal() if self._config.core == "diagonal" else factor @ core
        return _significant(factor @ _on_grid(right).view(width, rank).T * self._scale)

    def _key(self, factor: int, seed: int, info: ParameterInfo, number: int) -> int:
        period = self._config.refresh_left if factor == _LEFT else self._config.refresh_right
        if period == 0:
            return derive_seed(seed, factor, info.start)
        return derive_seed(self._config.seed or 0, factor, 0 if period is None else number // period, info.start)


@dataclass(frozen=True)
class Subset(Sampler):
    """Directions that are zero outside of some blocks of parameters, other ones at every step.

    With ``order: random`` a random share of the layers, as in LeZO (Wang et al., 2024, arXiv 2410.09823); with
    ``order: cyclic`` one block after another, as in MeZO-BCD (2025, arXiv 2501.19099). All directions of a step have
    the same blocks. Parameters that belong to no block are always active. The fewer coordinates are active, the larger
    the learning rate may be. With ``DenseMomentum`` and ``DenseAdam``, blocks that are not active are still moved by
    their moments.
    """

    sampler: Sampler = Gaussian()  # noqa: RUF009  (frozen)
    """The directions within the active blocks."""
    blocks: str = BLOCKS
    """A regular expression: what it finds in a parameter's name is the name of its block."""
    order: Literal["random", "cyclic"] = "random"
    """Which blocks are active: a random share of them, or one after another."""
    fraction: float = 0.25
    """The share of the blocks that is active, rounded up; for ``random`` only."""
    seed: int | None = None
    """Decides which blocks are drawn; null: the run's seed does, or 0 where there is no run."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"Subset(fraction={self.fraction}) must be above 0 and at most 1")
        if self.order not in ("random", "cyclic"):
            raise ValueError(f"Subset(order={self.order!r}) is unknown; choose 'random' or 'cyclic'")
        check_inner("Subset", self.sampler)
        check_pattern("Subset(blocks)", self.blocks)

    @property
    def nearly_orthogonal(self) -> bool:
        return self.sampler.nearly_orthogonal

    @property
    def unit_variance(self) -> bool:
        return False

    @property
    def inner(self) -> Sampler:
        return self.sampler

    def seeded(self, seed: int) -> Subset:
        return replace(self, sampler=self.sampler.seeded(seed), seed=seed if self.seed is None else self.seed)

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> Subset:
        return replace(self, sampler=self.sampler.settled(slices, table))

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _SubsetDirections(self, table)


class _SubsetDirections(Directions):
    def __init__(self, config: Subset, table: Sequence[ParameterInfo]):
        self._config = config
        self._layout = Layout(table)
        self._inner = config.sampler.bind(table)
        found = {info.start: re.search(config.blocks, info.name) for info in table}
        self._block_of = {start: match.group() for start, match in found.items() if match}
        self._blocks = list(dict.fromkeys(self._block_of.values()))
        self._active = lru_cache(maxsize=8)(self._draw)  # asked for every chunk of every term

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        active = self._active(number)
        for info, begin, end in self._layout.runs(start, start + out.numel()):
            part = out[info.start + begin - start : info.start + end - start]
            if self._block_of.get(info.start) in active:
                self._inner.fill(part, seed, info.start + begin, number)
            else:
                part.zero_()
        return out

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        info = self._layout.at(int(starts[0]))
        if self._block_of.get(info.start) in self._active(number):
            return self._inner.rows(seed, starts, width, number)
        return torch.zeros(len(starts), width, dtype=torch.float32, device=starts.device)

    def _draw(self, number: int) -> set[str | None]:
        """The active blocks of a step; None stands for parameters of no block."""
        if not self._blocks:
            raise ValueError(f"Subset(blocks={self._config.blocks!r}) is found in the name of no trainable parameter")
        if self._config.order == "cyclic":
            return {None, self._blocks[number % len(self._blocks)]}
        lots = {block: derive_seed(self._config.seed or 0, _BLOCKS, number, i) for i, block in enumerate(self._blocks)}
        return {None, *sorted(lots, key=lots.__getitem__)[: math.ceil(self._config.fraction * len(lots))]}


def _on_grid(values: Tensor) -> Tensor:
    """To multiples of 1/64, fp64."""
    return values.to(torch.float64).mul_(_GRID).round_().div_(_GRID)


def _significant(values: Tensor) -> Tensor:
    """fp64 values rounded to as many significant bits as every direction has."""
    dropped = 53 - SIGNIFICANT_BITS
    bits = values.view(torch.int64).add_(1 << (dropped - 1)).bitwise_and_(-(1 << dropped))
    return bits.view(torch.float64)
