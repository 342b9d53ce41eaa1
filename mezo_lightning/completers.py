"""What a model answers to a prompt, for a reward to judge.

A completer writes or picks one completion a row, at the model's current weights. ``Generate`` (generation.py) writes
token by token; ``ChooseOption`` picks among the options of each row in a single forward, which is how MeZO (Malladi et
al., 2023, section 3.3) makes accuracy an objective.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoder
from mezo_lightning.scoring import OptionScorer

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM


@dataclass(frozen=True)
class Completions:
    """One completion for each row of a batch."""

    texts: tuple[str, ...]
    """Decoded, without special tokens, up to the stop string, stripped."""
    ids: tuple[tuple[int, ...], ...]
    """The tokens behind each text, the one that ended it included."""
    finish_reasons: tuple[str, ...]
    """Why each ended: ``stop``, at an end token or stop string, or ``length``, cut off."""

    @staticmethod
    def concatenate(parts: Sequence[Completions]) -> Completions:
        """The completions of several micro-batches as those of one batch."""
        return Completions(
            tuple(text for part in parts for text in part.texts),
            tuple(ids for part in parts for ids in part.ids),
            tuple(reason for part in parts for reason in part.finish_reasons),
        )


class BoundCompleter(ABC):
    """A completer at work on one model."""

    @abstractmethod
    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming the row, if the batch cannot be completed."""

    @abstractmethod
    def complete(self, batch: Batch, *, seed: int) -> Completions:
        """Completions at the current weights; the same seed gives each sample the same noise."""


class Completer(ABC):
    """How completions come about."""

    @property
    @abstractmethod
    def autoregressive(self) -> bool:
        """Whether the model runs once a token, at the same weights."""

    @abstractmethod
    def bind(self, model: CausalLM, encoder: Encoder) -> BoundCompleter:
        """Set to work on one model."""


@dataclass(frozen=True)
class ChooseOption(Completer):
    """The completion is the option with the highest mean log-probability per token."""

    @property
    def autoregressive(self) -> bool:
        """One forward scores all options."""
        return False

    def bind(self, model: CausalLM, encoder: Encoder) -> BoundCompleter:
        """Set to work on one model."""
        return _BoundChoice(OptionScorer(model, encoder))


class _BoundChoice(BoundCompleter):
    def __init__(self, scorer: OptionScorer):
        self._scorer = scorer

    def check(self, batch: Batch) -> None:
        self._scorer.check(batch)

    def complete(self, batch: Batch, *, seed: int) -> Completions:
        del seed  # nothing is drawn
        chosen = self._scorer(batch).argmax(-1).tolist()
        options = batch.options or ()
        texts = [row[choice] for row, choice in zip(options, chosen, strict=True)]
        ids = [self._scorer.target_ids(*pair) for pair in zip(batch.prompts, texts, strict=True)]
        return Completions(tuple(text.strip() for text in texts), tuple(ids), ("stop",) * len(texts))
