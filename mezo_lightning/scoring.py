"""Log-probabilities of words that follow a prompt, or fill its mask: one forward a batch, logits only where they count.

Continuations are teacher forced. A sequence is run without its last token, whose logits nobody needs. Sequences that
are then the same are run once: the options of a row that are one token long share the forward of their prompt, which
halves the cost of a two-way choice; words for a mask always do. Rows never share one, for an evaluator may give each
row weights of its own; which rows run is declared to it (``rowwise``).
The arithmetic is fp32 over logits of any dtype, summed in fp64: a loss in 16 bits would make steps of 0.5 out of
projected gradients (see MeZO's fp16 recipe at epsilon 1e-3).
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoder
from mezo_lightning.masked import MaskedEncoder, mask_logits
from mezo_lightning.models.kinds import is_masked
from mezo_lightning.models.pretrained import base_model
from mezo_lightning.models.virtual_tokens import virtual_tokens
from mezo_lightning.rowwise.points import rows_that_run, running

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM

T = TypeVar("T")
CHUNK_ELEMENTS = 1 << 22
"""Logits turned to fp32 at a time: 16 MB."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of M targets."""

    mean: Tensor
    """fp64 [M]: per token of the target."""
    tokens: Tensor
    """int64 [M]: how many tokens each has."""


class TargetScorer(ABC):
    """Scores targets: texts where their prompts leave room for them."""

    @abstractmethod
    def check(self, index: Sequence[int], texts: Iterable[tuple[str, str]]) -> None:
        """Raise ValueError, naming the row, if a prompt and its target cannot be scored.

        Args:
            index: Row numbers, for the message.
            texts: The prompt and target of each row.
        """

    @abstractmethod
    def target_ids(self, prompt: str, target: str) -> tuple[int, ...]:
        """The tokens that a target is at its prompt."""

    @abstractmethod
    def __call__(self, prompts: Sequence[str], targets: Sequence[str]) -> Scores:
        """Scores of each target at its prompt."""


class Scorer(TargetScorer):
    """Scores continuations of prompts with one causal model.

    Args:
        model: The model; run at the weights that it has when asked.
        encoder: Encodes for this model.
    """

    def __init__(self, model: CausalLM, encoder: Encoder):
        accepted = inspect.signature(base_model(model).forward).parameters
        self._model = model
        self._encoder = encoder
        self._slices_logits = "logits_to_keep" in accepted
        self._takes_positions = "position_ids" in accepted
        self._virtual = virtual_tokens(model)

    def check(self, index: Sequence[int], texts: Iterable[tuple[str, str]]) -> None:
        self._encoder.check(index, texts)

    def target_ids(self, prompt: str, target: str) -> tuple[int, ...]:
        return self._encoder.continued(prompt, target).target_ids

    def __call__(self, prompts: Sequence[str], targets: Sequence[str]) -> Scores:
        texts = [self._encoder.continued(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        parts = self.log_probs([text.ids for text in texts], [text.target_length for text in texts])
        count = torch.tensor([len(part) for part in parts], device=parts[0].device)
        # Padding to a matrix sums each continuation in its own order, and the same way on every device.
        return Scores(torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).sum(-1) / count, count)

    def log_probs(self, sequences: Sequence[tuple[int, ...]], lengths: Sequence[int]) -> list[Tensor]:
        """The log-probabilities of the last tokens of some sequences, each given all before it.

        Args:
            sequences: Token ids.
            lengths: How many of the last tokens of each are wanted.

        Returns:
            Fp64 [lengths[i]] for sequence i.
        """
        inputs, rows = _shared([ids[:-1] for ids in sequences])
        with running([rows.index(number) for number in range(len(inputs))]):
            logits = self._logits(inputs, max(lengths))
        row = [r for r, n in zip(rows, lengths, strict=True) for _ in range(n)]
        column = [logits.shape[1] - n + i for n in lengths for i in range(n)]
        target = [token for ids, n in zip(sequences, lengths, strict=True) for token in ids[len(ids) - n :]]
        log_probs = _pick(logits, *(torch.tensor(x, device=logits.device) for x in (row, column, target)))
        return list(log_probs.double().split(list(lengths)))

    def _logits(self, inputs: Sequence[tuple[int, ...]], keep: int) -> Tensor:
        """Logits of at least the last ``keep`` tokens of each input, in the model's dtype: [N, at least keep, V]."""
        batch = self._encoder.pad(inputs, self._model.device)
        if not self._takes_positions:
            del batch["position_ids"]
        keeping = {"logits_to_keep": keep} if self._slices_logits else {}
        if self._virtual is not None:
            return self._virtual.base(**self._virtual.in_front(batch), **keeping).logits
        return self._model(**batch, use_cache=False, **keeping).logits


class MaskedScorer(TargetScorer):
    """Scores single tokens in the place of the mask of prompts, with one masked model.

    Args:
        model: The model; run at the weights that it has when asked.
        encoder: Encodes for this model.
    """

    def __init__(self, model: CausalLM, encoder: MaskedEncoder):
        self._model = model
        self._encoder = encoder

    def check(self, index: Sequence[int], texts: Iterable[tuple[str, str]]) -> None:
        self._encoder.check(index, texts)

    def target_ids(self, prompt: str, target: str) -> tuple[int, ...]:
        return (self._encoder.token(prompt, target),)

    def __call__(self, prompts: Sequence[str], targets: Sequence[str]) -> Scores:
        inputs, rows = _shared(prompts)
        texts = [self._encoder.prompt(prompt) for prompt in inputs]
        batch = self._encoder.pad(texts, self._model.device)
        with running([rows.index(number) for number in range(len(inputs))]):
            logits = mask_logits(self._model, batch, [text.place for text in texts])[:, None]
        row = torch.tensor(rows, device=logits.device)
        target = [self._encoder.token(*pair) for pair in zip(prompts, targets, strict=True)]
        log_probs = _pick(logits, row, torch.zeros_like(row), torch.tensor(target, device=logits.device))
        return Scores(log_probs.double(), torch.ones_like(row))


def scorer_for(model: CausalLM, encoder: Encoder) -> TargetScorer:
    """The scorer of a model's kind.

    Args:
        model: A causal or a masked model.
        encoder: Encodes for it, if it is causal; else its tokenizer and rules are taken.
    """
    if is_masked(base_model(model)):
        return MaskedScorer(model, MaskedEncoder(model, encoder.tokenizer, encoder.encoding))
    return Scorer(model, encoder)


class OptionScorer:
    """Scores the options of each row of a batch.

    Args:
        model: The model; run at the weights that it has when asked.
        encoder: Encodes for this model.
    """

    def __init__(self, model: CausalLM, encoder: Encoder):
        self._scorer = scorer_for(model, encoder)

    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming the row, if its options cannot be scored."""
        options = self._options(batch)
        index = [row for row, texts in zip(batch.index, options, strict=True) for _ in texts]
        self._scorer.check(index, _pairs(batch.prompts, options))

    def target_ids(self, prompt: str, option: str) -> tuple[int, ...]:
        """The tokens that an option is at its prompt."""
        return self._scorer.target_ids(prompt, option)

    def __call__(self, batch: Batch) -> Tensor:
        """Mean log-probability per token of each option, fp64 [N, options]; -inf where a row has fewer options."""
        options = self._options(batch)
        prompts, texts = zip(*_pairs(batch.prompts, options), strict=True)
        with running([place for place, row in enumerate(options) for _ in row]):
            scores = self._scorer(prompts, texts).mean.split([len(row) for row in options])
        return torch.nn.utils.rnn.pad_sequence(list(scores), batch_first=True, padding_value=-torch.inf)

    @staticmethod
    def _options(batch: Batch) -> tuple[tuple[str, ...], ...]:
        if batch.options is None:
            raise ValueError("this objective chooses between options: give the data module options and a label")
        for row, texts in zip(batch.index, batch.options, strict=True):
            if not texts:
                raise ValueError(f"row {row}: there is no option to choose")
        return batch.options


def _pairs(prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    return [(prompt, text) for prompt, texts in zip(prompts, options, strict=True) for text in texts]


def _shared(inputs: Sequence[T]) -> tuple[list[T], list[int]]:
    """What has to be run, and which of it each input is; equal inputs are run once, those of each row for itself."""
    rows = rows_that_run() or range(len(inputs))
    numbers: dict[tuple[int, T], int] = {}
    found = [numbers.setdefault(key, len(numbers)) for key in zip(rows, inputs, strict=True)]
    return [each for _, each in numbers], found


def _pick(logits: Tensor, row: Tensor, column: Tensor, target: Tensor) -> Tensor:
    """fp32 log-probabilities of some tokens, [number of them]."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    picked = []
    for r, c, t in zip(row.split(size), column.split(size), target.split(size), strict=True):
        scores = logits[r, c].float()
        picked.append(scores.gather(-1, t[:, None])[:, 0] - scores.logsumexp(-1))
    return torch.cat(picked)
