"""How many weights of a parameter have which magnitude: exact, and the same for any cut over processes.

The bits of an fp32 magnitude, taken as an integer, number the floats in order. So weights are counted by their upper 16
bits, which are their magnitude in bf16 with the rest cut off, and in a second pass by the lower ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from mezo_lightning.samplers import chunk_numel
from mezo_lightning.shards import Shard

if TYPE_CHECKING:
    from mezo_lightning.parameters import Slice


def count_magnitudes(piece: Slice, shift: int = 16, above: int = 0, *, advice: str) -> Tensor:
    """How many weights have which 16 bits of their fp32 magnitude from bit ``shift`` on: int64 [65536].

    Args:
        piece: What this process holds of the parameter, maybe nothing; where that is cut up, all processes call this.
        shift: 16 or 0.
        above: The bits above those; weights that have others are not counted.
        advice: What to do where the other processes are out of reach.

    Raises:
        ValueError: If the parameter is cut up and they are.
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64, device=piece.parameter.device)
    for chunk in piece.weights.split(chunk_numel(counts.device)):
        magnitudes = chunk.to(torch.float32).abs().view(torch.int32)
        if shift == 0:
            magnitudes = magnitudes[magnitudes >> 16 == above]
        counts += torch.bincount(magnitudes >> shift & 0xFFFF, minlength=1 << 16)
    if isinstance(piece.parameter, Shard):
        if not dist.is_initialized():
            raise ValueError(
                f"{advice}: all weights of {piece.info.name!r} have to be counted, of which this process has a piece "
                "only, and there is no torch.distributed job"
            )
        dist.all_reduce(counts)
    return counts


def sum_of_squares(piece: Slice, *, advice: str) -> float:
    """That of a parameter's weights as bf16 has them, cut off: no order of adding up changes a bit of it.

    Args:
        piece: As for ``count_magnitudes``.
        advice: Likewise.
    """
    counts = count_magnitudes(piece, advice=advice).cpu()
    found = counts.nonzero().flatten()
    magnitudes = (found.to(torch.int32) << 16).view(torch.float32).double()
    # Squares have 16 significant bits: times a count they are exact in fp64, and fsum rounds once.
    return math.fsum(counts[found].double().mul(magnitudes.square()).tolist())
