"""What an objective is: configuration that, bound to a model, measures a batch at the model's current weights.

Per-sample values, not means, are what paired masking, logs and exact reductions need.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoding
from mezo_lightning.evaluators import Samples
from mezo_lightning.probes import Probe
from mezo_lightning.processes.ranks import Ranks
from mezo_lightning.rewarding.log import Tally

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM, Pretrained


class BoundObjective(ABC):
    """An objective at work on one model."""

    @abstractmethod
    def lacks(self, batch: Batch) -> str | None:
        """What the rows lack to be measured, such as a label or a reward's column, in words; None if nothing."""

    @abstractmethod
    def check(self, batch: Batch, *, measured: bool = True) -> None:
        """Raise ValueError, naming the row, for what cannot be evaluated; without the model, so fit for a whole split.

        Args:
            batch: The rows, as many as there are.
            measured: Whether they are to be measured; False where they are only to be completed.
        """

    def check_ranks(self, ranks: Ranks) -> None:
        """Raise ValueError where the processes of the job cannot measure together."""
        del ranks

    @abstractmethod
    def startup(self, batch: Batch) -> Samples:
        """Measure one real batch before the first step; whatever is wrong raises, even where failures are masked.

        Args:
            batch: Some rows of the training data.
        """

    @abstractmethod
    def samples(self, batch: Batch, *, seed: int) -> Samples:
        """Measure a batch at the model's current weights.

        Args:
            batch: The rows.
            seed: Of the step: decides the noise of sampled decoding, which all probes of a step share.
        """

    @abstractmethod
    def complete(self, batch: Batch, *, seed: int) -> Samples:
        """What the model answers, not measured: no value is valid, and there are no metrics.

        Args:
            batch: The rows; they may lack what measuring needs.
            seed: See ``samples``.
        """

    def measure(self, batch: Batch, *, seed: int, probe: Probe = Probe()) -> Samples:  # noqa: B008  (frozen)
        """Measure a batch by all ranks together, in micro-batches.

        Args:
            batch: All rows, on every rank.
            seed: See ``samples``.
            probe: Who measures, and when.
        """
        return probe.collect(batch, lambda part: self.samples(part, seed=seed))

    def predict(self, batch: Batch, *, seed: int, probe: Probe = Probe()) -> Samples:  # noqa: B008  (frozen)
        """Measure a batch, or only complete it where its rows lack what measuring needs.

        Args:
            batch: All rows, on every rank.
            seed: See ``samples``.
            probe: Who measures, and when.
        """
        if self.lacks(batch) is None:
            return self.measure(batch, seed=seed, probe=probe)
        return probe.collect(batch, lambda part: self.complete(part, seed=seed))

    def take_tally(self) -> Tally:
        """What there is to say about asking rewards since this was last called."""
        return Tally()

    def state_dict(self) -> dict[str, Any]:
        """What a run that is resumed has to know of this one; plain data, for a checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave, perhaps in another process; empty where a checkpoint holds nothing."""
        del state


class Objective(ABC):
    """What to minimise."""

    @property
    @abstractmethod
    def autoregressive(self) -> bool:
        """Whether the model runs many times at the same weights, which the evaluator ``Copy`` suits better."""

    def check_model(self, pretrained: Pretrained) -> None:
        """Raise ValueError for a model that cannot serve, before it is loaded."""
        del pretrained

    @abstractmethod
    def bind(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> BoundObjective:
        """Set to work on one model.

        Args:
            model: The model, in eval mode.
            tokenizer: Its tokenizer.
            encoding: How text becomes tokens.
        """


def unmeasured(texts: tuple[str, ...]) -> Samples:
    """Completions that nobody has measured: no value is valid."""
    values = torch.zeros(len(texts), 1, dtype=torch.float64)
    return Samples(values, torch.zeros_like(values, dtype=torch.bool), texts)


def complaint(check: Callable[[], object]) -> str | None:
    """What a check finds fault with, in the words of its ValueError; None if it passes."""
    try:
        check()
    except ValueError as error:
        return str(error)
    return None
