"""Directions that are zero at the large weights of each matrix, as large as those are at the beginning of the step.

Such directions are functions of the weights too, but of nothing else that is new: the weights of a step are what the
steps before it made of the base, and what is large is decided once, on the base weights, and kept with the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.magnitudes import count_magnitudes
from mezo_lightning.samplers import Directions, Gaussian, Sampler

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo, Slice


_NO_LIMIT = torch.finfo(torch.float32).max  # infinity would be no number in JSON


@dataclass(frozen=True)
class Sparse(Sampler):
    """Directions that move only the small weights of every matrix (Sparse-MeZO: Liu et al., 2024, arXiv 2402.15751).

    ``z = m * z'`` for directions z' of another sampler, where ``m = (|theta| <= threshold)`` is made anew from the
    weights of each step, so that no mask is kept, and the threshold of a matrix is the magnitude that a fraction of its
    weights had when the run began. Parameters of fewer than two dimensions (biases, norms) are moved as a whole, and so
    are matrices that are all zeros then, as LoRA's B is: none of their weights is small beside others. A
    weight that has grown past its threshold is moved no more by directions. Weight decay acts on all weights, and so do
    the moments of ``DenseMomentum`` and ``DenseAdam``: they go on moving a weight that was small at earlier steps, as
    momentum does in torch when gradients are masked.

    z is not made longer for what it leaves out: a weight that moves is probed epsilon away and has the steps of lr that
    it would have without ``Sparse``. As the estimate is less noisy the fewer weights move, lr may be larger.

    The thresholds are found when the optimizer is built, of the weights as they are then: exactly, in two passes over
    them, and the same however these are cut up over processes. They are in the log and in checkpoints.
    """

    sampler: Sampler = Gaussian()  # noqa: RUF009  (frozen)
    """The directions among the small weights."""
    fraction: float = 0.25
    """The share of each matrix's weights that is small when the run begins."""
    thresholds: dict[str, float] | None = field(default=None, compare=False, repr=False)
    """The largest magnitude that moves, by the name of each matrix, 3.4028234663852886e38 (the largest fp32 number) if
    all of it does; null: found from the weights, as said above."""

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction < 1.0:
            raise ValueError(f"Sparse(fraction={self.fraction}) must be above 0 and below 1")
        if self.sampler.looks_at_weights:
            raise ValueError("Sparse(sampler=Sparse) leaves out weights twice: use one of them")
        for name, threshold in (self.thresholds or {}).items():
            if not (math.isfinite(threshold) and threshold > 0.0):
                raise ValueError(f"Sparse(thresholds={{{name!r}: {threshold}}}) must be a positive number")

    @property
    def nearly_orthogonal(self) -> bool:
        return self.sampler.nearly_orthogonal

    @property
    def unit_variance(self) -> bool:
        return False

    @property
    def looks_at_weights(self) -> bool:
        return True

    @property
    def inner(self) -> Sampler:
        return self.sampler

    def seeded(self, seed: int) -> Sparse:
        return replace(self, sampler=self.sampler.seeded(seed))

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> Sparse:
        inner = self.sampler.settled(slices, table)
        matrices = [info for info in table if len(info.shape) >= 2]
        if self.thresholds is None:
            own = {piece.info.start: piece for piece in slices}
            found = {info.name: _threshold(own[info.start], self.fraction) for info in matrices}
            return replace(self, sampler=inner, thresholds=found)
        for info in matrices:
            if info.name not in self.thresholds:
                raise ValueError(
                    f"Sparse(thresholds) has no threshold for {info.name!r}: give one for every matrix that is tuned, "
                    "or none at all"
                )
        return replace(self, sampler=inner)

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return _SparseDirections(self.sampler.bind(table), self.thresholds)


class _SparseDirections(Directions):
    def __init__(self, inner: Directions, thresholds: Mapping[str, float] | None):
        self._inner = inner
        self._thresholds = thresholds

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        return self._inner.fill(out, seed, start, number)

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        return self._inner.rows(seed, starts, width, number)

    def active(self, info: ParameterInfo, weights: Tensor) -> Tensor | None:
        assert self._thresholds is not None, "a space of parameters settles its sampler before it binds it"
        if len(info.shape) < 2:
            return None
        return weights.to(torch.float32).abs().le_(self._thresholds[info.name])


def _threshold(piece: Slice, fraction: float) -> float:
    """The smallest magnitude of a matrix's weights that at least a fraction of them does not exceed; none if all are 0.

    Weights are counted by the upper 16 bits of their magnitude, and those that have the upper bits of the threshold by
    the lower ones.

    Args:
        piece: What this process holds of the matrix, maybe nothing; where it is cut up, all processes call this.
        fraction: See above.

    Raises:
        ValueError: If it would be 0 but some weights are not, or the matrix is cut up and the other pieces are out of
            reach.
    """
    bits, rank, zeros = 0, math.ceil(fraction * piece.info.numel), 0
    for shift in (16, 0):
        counts = count_magnitudes(piece, shift, bits, advice="Sparse: give thresholds")
        up_to = counts.cumsum(0)
        place = int(torch.searchsorted(up_to, rank))
        rank -= int(up_to[place] - counts[place])
        bits, zeros = bits << 16 | place, int(counts[0])
    if not bits and zeros == piece.info.numel:
        return _NO_LIMIT
    if not bits:
        raise ValueError(
            f"Sparse(fraction={fraction}): {zeros} of the {piece.info.numel} weights of {piece.info.name!r} are 0, so "
            "that they alone would be its small ones, and none of them could move twice: raise fraction above "
            f"{zeros / piece.info.numel:.3g}, freeze it, or use another sampler"
        )
    return torch.tensor([bits], dtype=torch.int32).view(torch.float32).item()
