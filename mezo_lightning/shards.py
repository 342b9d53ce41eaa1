"""A piece of a parameter that lies cut up over several processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Shard(nn.Parameter):
    """A contiguous piece of a parameter that lies cut up over several processes, sharing storage with what they hold.

    It stands for its parameter wherever parameters are taken. It may be empty.

    Args:
        data: The piece, flat: [n].
        whole: Shape of the whole parameter.
        begin: Where the piece begins in the flattened parameter.
        requires_grad: Whether the parameter is trainable.
    """

    whole: torch.Size
    begin: int

    def __new__(cls, data: Tensor, whole: Sequence[int], begin: int, requires_grad: bool = True) -> Shard:
        assert data.dim() == 1, data.shape
        self = super().__new__(cls, data, requires_grad)
        self.whole = torch.Size(whole)
        self.begin = begin
        return self


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, also where only a piece of it is here."""
    return parameter.whole if isinstance(parameter, Shard) else parameter.shape
