"""Weights in files, of which any piece can be read without the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor


class WeightFiles(ABC):
    """Weights by name, in files."""

    @property
    @abstractmethod
    def shapes(self) -> Mapping[str, torch.Size]:
        """Names and shapes of all that is there."""

    @abstractmethod
    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Elements [begin, end) of a flattened weight: [end - begin] on the CPU, in the dtype of the file.

        Takes no more memory than the piece, and a row at each of its ends. It is not to be written to: it may be the
        memory of a file.
        """
