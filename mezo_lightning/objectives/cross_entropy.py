"""The cross-entropy of what should have been answered: of a target's tokens, or over the options of a row.

With options it is MeZO's training loss for classification (Malladi et al., 2023, appendix E): the cross-entropy over
the options' mean log-probabilities per token. Without options MeZO averages over all tokens of the batch; we average
over each sample's tokens first, so that a sample weighs the same whatever it is batched with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo_lightning.completers import BoundCompleter, ChooseOption
from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoding
from mezo_lightning.evaluators import Samples
from mezo_lightning.objectives.base import BoundObjective, Objective, complaint, unmeasured
from mezo_lightning.scoring import OptionScorer, TargetScorer, scorer_for

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Mean negative log-probability of the target's tokens; with options, cross-entropy over the options."""

    @property
    def autoregressive(self) -> bool:
        """One forward does it."""
        return False

    def bind(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> BoundObjective:
        """Set to work on one model."""
        encoder = encoding.bind(model, tokenizer)
        choice = ChooseOption().bind(model, encoder)
        return _BoundCrossEntropy(scorer_for(model, encoder), OptionScorer(model, encoder), choice)


class _BoundCrossEntropy(BoundObjective):
    def __init__(self, scorer: TargetScorer, option_scorer: OptionScorer, choice: BoundCompleter):
        self._scorer = scorer
        self._option_scorer = option_scorer
        self._choice = choice

    def lacks(self, batch: Batch) -> str | None:
        return complaint(lambda: _targets(batch) if batch.options is None else _answers(batch))

    def check(self, batch: Batch, *, measured: bool = True) -> None:
        if not measured:
            _check_there_is_a_choice(batch)
            self._choice.check(batch)
        elif batch.options is None:
            self._scorer.check(batch.index, zip(batch.prompts, _targets(batch), strict=True))
        else:
            _answers(batch)
            self._option_scorer.check(batch)

    def startup(self, batch: Batch) -> Samples:
        return self.samples(batch, seed=0)

    @torch.inference_mode()
    def samples(self, batch: Batch, *, seed: int) -> Samples:
        del seed  # nothing is drawn
        return self._over_tokens(batch) if batch.options is None else self._over_options(batch)

    @torch.inference_mode()
    def complete(self, batch: Batch, *, seed: int) -> Samples:
        _check_there_is_a_choice(batch)
        return unmeasured(self._choice.complete(batch, seed=seed).texts)

    def _over_tokens(self, batch: Batch) -> Samples:
        scores = self._scorer(batch.prompts, _targets(batch))
        loss = -scores.mean
        return _samples(loss, {"loss": loss, "tokens": scores.tokens.double()})

    def _over_options(self, batch: Batch) -> Samples:
        scores = self._option_scorer(batch)
        answers = torch.tensor(_answers(batch), device=scores.device)
        loss = -scores.log_softmax(-1).gather(-1, answers[:, None])[:, 0]
        chosen = scores.argmax(-1)
        texts = tuple(texts[place].strip() for texts, place in zip(batch.options or (), chosen.tolist(), strict=True))
        return _samples(loss, {"loss": loss, "accuracy": (chosen == answers).double()}, texts)


def _samples(loss: Tensor, metrics: dict[str, Tensor], texts: tuple[str, ...] | None = None) -> Samples:
    return Samples(loss[:, None], torch.ones_like(loss[:, None], dtype=torch.bool), texts, metrics)


def _check_there_is_a_choice(batch: Batch) -> None:
    if batch.options is None:
        raise ValueError(
            "CrossEntropy writes no text, and without options there is none to choose: give the data module options, "
            "or set model.objective to a RewardObjective, whose completer writes"
        )


def _targets(batch: Batch) -> tuple[str, ...]:
    if batch.targets is None:
        raise ValueError("CrossEntropy needs something to predict: give the data module a target, or options")
    return batch.targets


def _answers(batch: Batch) -> tuple[int, ...]:
    if batch.answers is None:
        raise ValueError("CrossEntropy over options needs to know the right one: give the data module a label")
    return batch.answers
