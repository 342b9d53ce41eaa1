"""Log-probabilities of continuations, teacher forced: one forward for a whole batch, logits only where they count.

A sequence is run without its last token, whose logits nobody needs. Sequences that are then the same are run once: the
options of a row that are one token long share the forward of their prompt, which halves the cost of a two-way choice.
The arithmetic is fp32 over logits of any dtype, summed in fp64: a loss in 16 bits would make steps of 0.5 out of
projected gradients (see MeZO's fp16 recipe at epsilon 1e-3).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoder
from mezo_lightning.models import base_model

if TYPE_CHECKING:
    from mezo_lightning.models import CausalLM

CHUNK_ELEMENTS = 1 << 22
"""Logits turned to fp32 at a time: 16 MB."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of M continuations."""

    mean: Tensor
    """fp64 [M]: per token of the continuation."""
    tokens: Tensor
    """int64 [M]: how many tokens each has."""


class Scorer:
    """Scores continuations of prompts with one model.

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

    def __call__(self, prompts: Sequence[str], targets: Sequence[str]) -> Scores:
        """Scores of each target as the continuation of its prompt."""
        texts = [self._encoder.continued(prompt, target) for prompt, target in zip(prompts, targets, strict=True)]
        inputs: dict[tuple[int, ...], int] = {}
        rows = [inputs.setdefault(text.ids[:-1], len(inputs)) for text in texts]
        lengths = [text.target_length for text in texts]
        logits = self._logits(list(inputs), max(lengths))
        row = [r for r, n in zip(rows, lengths, strict=True) for _ in range(n)]
        column = [logits.shape[1] - n + i for n in lengths for i in range(n)]
        target = [token for text in texts for token in text.target_ids]
        log_probs = _pick(logits, *(torch.tensor(x, device=logits.device) for x in (row, column, target)))
        count = torch.tensor(lengths, device=logits.device)
        # Padding to a matrix sums each continuation in its own order, and the same way on every device.
        parts = torch.nn.utils.rnn.pad_sequence(list(log_probs.double().split(lengths)), batch_first=True)
        return Scores(parts.sum(-1) / count, count)

    def _logits(self, inputs: list[tuple[int, ...]], keep: int) -> Tensor:
        batch = self._encoder.pad(inputs, self._model.device)
        if not self._takes_positions:
            del batch["position_ids"]
        if self._slices_logits:
            return self._model(**batch, use_cache=False, logits_to_keep=keep).logits
        return self._model(**batch, use_cache=False).logits


class OptionScorer:
    """Scores the options of each row of a batch.

    Args:
        model: The model; run at the weights that it has when asked.
        encoder: Encodes for this model.
    """

    def __init__(self, model: CausalLM, encoder: Encoder):
        self._scorer = Scorer(model, encoder)
        self._encoder = encoder

    def check(self, batch: Batch) -> None:
        """Raise ValueError, naming the row, if its options cannot be scored."""
        options = self._options(batch)
        index = [row for row, texts in zip(batch.index, options, strict=True) for _ in texts]
        self._encoder.check(index, _pairs(batch.prompts, options))

    def __call__(self, batch: Batch) -> Tensor:
        """Mean log-probability per token of each option, fp64 [N, options]; -inf where a row has fewer options."""
        options = self._options(batch)
        prompts, texts = zip(*_pairs(batch.prompts, options), strict=True)
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


def _pick(logits: Tensor, row: Tensor, column: Tensor, target: Tensor) -> Tensor:
    """fp32 log-probabilities of some tokens, [number of them]."""
    size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    picked = []
    for r, c, t in zip(row.split(size), column.split(size), target.split(size), strict=True):
        scores = logits[r, c].float()
        picked.append(scores.gather(-1, t[:, None])[:, 0] - scores.logsumexp(-1))
    return torch.cat(picked)
