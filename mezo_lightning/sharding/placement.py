"""Where the weights are: whole on every process, or cut up over all of them; and how evaluations get at them.

``Whole`` serves one process, and several of which each has a copy (the strategy ``replicated``); ``Sharded`` in
``zero3.py`` cuts the weights up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mezo_lightning.evaluators import Copy, Evaluator
from mezo_lightning.fingerprints import fingerprint_of, named_weights
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.processes.ranks import Alone, Ranks
from mezo_lightning.rowwise.evaluator import Rowwise
from mezo_lightning.shards import whole_shape
from mezo_lightning.trajectory import Header

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM, Pretrained


class Placement(ABC):
    """Loads a model, and says where its weights are."""

    ranks: Ranks

    @abstractmethod
    def load(self, pretrained: Pretrained, dtype: torch.dtype) -> CausalLM:
        """Load a model to where its weights belong."""

    @abstractmethod
    def adopt(self, model: CausalLM) -> None:
        """Take over a model that was loaded by someone else."""

    @abstractmethod
    def named_parameters(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        """All parameters by name, once each; a ``Shard`` where this process has a piece only."""

    @abstractmethod
    def named_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint would hold: parameters, as ``named_parameters`` gives them, and persistent buffers."""

    def parameter_counts(self, model: nn.Module) -> tuple[int, int]:
        """How many weights the model has in all, and how many of them are trainable."""
        sizes = [(whole_shape(p).numel(), p.requires_grad) for _, p in self.named_parameters(model)]
        return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)

    @abstractmethod
    def fingerprint(self, space: ParameterSpace) -> int:
        """The fingerprint of the whole model's tuned weights, the same on all ranks if they agree."""

    @abstractmethod
    def frozen_fingerprint(self, model: nn.Module, space: ParameterSpace) -> int:
        """The fingerprint of all the model's other weights, the same on all ranks if they agree."""

    def header(self, model: nn.Module, space: ParameterSpace, base: Mapping[str, Any]) -> Header:
        """The header for the log of a run that starts from the weights as they are now.

        Args:
            model: The model.
            space: The parameters that the run tunes.
            base: Where the base weights come from.
        """
        return Header.of(space, base, self.fingerprint(space), self.frozen_fingerprint(model, space))

    @abstractmethod
    def present(self, model: nn.Module) -> AbstractContextManager[object]:
        """While in this context, the model computes with its weights as they are."""

    @abstractmethod
    def evaluator(
        self, model: nn.Module, space: ParameterSpace, *, copies: bool, min_valid_fraction: float
    ) -> Evaluator:
        """The evaluator for a space of the model's parameters.

        Args:
            model: The model.
            space: The parameters to perturb.
            copies: Whether the model runs often at each point, so that perturbing it once is better.
            min_valid_fraction: See ``Evaluator``.
        """


class Whole(Placement):
    """All weights on this process.

    Args:
        ranks: The processes of the job, each with a copy.
    """

    def __init__(self, ranks: Ranks | None = None):
        self.ranks = ranks or Alone()

    def load(self, pretrained: Pretrained, dtype: torch.dtype) -> CausalLM:
        return pretrained.load(dtype)

    def adopt(self, model: CausalLM) -> None:
        pass

    def named_parameters(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        return list(model.named_parameters())

    def named_weights(self, model: nn.Module) -> dict[str, Tensor]:
        return named_weights(model)

    def fingerprint(self, space: ParameterSpace) -> int:
        return space.fingerprint()

    def frozen_fingerprint(self, model: nn.Module, space: ParameterSpace) -> int:
        return fingerprint_of(self.named_weights(model).items(), without=space.parameters)

    def present(self, model: nn.Module) -> AbstractContextManager[object]:
        return nullcontext()

    def evaluator(
        self, model: nn.Module, space: ParameterSpace, *, copies: bool, min_valid_fraction: float
    ) -> Evaluator:
        enough = min_valid_fraction
        if copies:
            plain: Evaluator = Copy(space, min_valid_fraction=enough)
        else:
            # Several ranks meet within the objective: all would have to part at the same place.
            lockstep = isinstance(self.ranks, Alone)
            plain = LeafScratch(model, space, lockstep=lockstep, min_valid_fraction=enough)
        if isinstance(space.sampler, Flipout):
            return Rowwise(model, space, plain, min_valid_fraction=enough)
        return plain
