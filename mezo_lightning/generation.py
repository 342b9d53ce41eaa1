"""Completions, token by token: batched greedy decoding, or sampling with common random numbers.

Decoding is MeZO's (Malladi et al., 2023): greedy on left-padded prompts up to the first stop string; the completion is
decoded without special tokens and stripped. We deviate in three things. The attention mask is passed. Nothing is
inherited from the checkpoint's generation_config but its end tokens, so that what a run does is in its own
configuration. And where sampling is asked for, the noise is no global generator's: ``KeyedGumbel`` takes the largest of
``logit / temperature + Gumbel(seed, sample, token position, vocabulary id)``, which is a draw from the softmax (Gumbel,
1954; Maddison, Tarlow & Minka, 2014), and gives all probes of a step the same noise, whatever the batches.

Stop strings cost a search in the text at every token when left to ``generate``. A vocabulary entry that contains a stop
string by itself is made an end token instead, which is enough for a newline; only a string that can be cut in pieces is
searched for, in the tail of the text.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from mezo_lightning.completers import BoundCompleter, Completer, Completions
from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoder, naming_row
from mezo_lightning.models.kinds import is_masked
from mezo_lightning.models.pretrained import base_model
from mezo_lightning.models.virtual_tokens import virtual_tokens
from mezo_lightning.samplers import GOLDEN, derive_seed, mix64

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM

CHUNK_ELEMENTS = 1 << 20
"""Numbers of sampling noise made at a time: 8 MB."""


@dataclass(frozen=True)
class Generate(Completer):
    """The completion is what the model writes, greedily, or sampled at a temperature."""

    max_new_tokens: int = 50
    """longest completion in tokens; prompts must leave this much room"""
    stop: tuple[str, ...] = ("\n",)
    """a completion ends before the first of these strings, or at the model's own end token"""
    temperature: float = 0.0
    """0: greedy; above: sample, with the same noise at all probes of a step"""
    top_k: int | None = None
    """sample from this many likeliest tokens only"""
    top_p: float | None = None
    """sample from the likeliest tokens that together have this probability only"""

    def __post_init__(self) -> None:
        """Refuse values that cannot work, or would be ignored."""
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if isinstance(self.stop, str) or "" in self.stop:
            raise ValueError(f"stop={self.stop!r} must be a list of strings, none of them empty")
        if not 0.0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.temperature == 0.0 and (self.top_k, self.top_p) != (None, None):
            raise ValueError("top_k and top_p need a temperature above 0: greedy decoding ignores them")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")

    @property
    def autoregressive(self) -> bool:
        """The model runs once a token."""
        return True

    def bind(self, model: CausalLM, encoder: Encoder) -> BoundCompleter:
        """Set to work on one model."""
        if is_masked(base_model(model)):
            raise ValueError(
                f"Generate writes token by token, which a {type(base_model(model)).__name__} cannot: it fills in masks;"
                " use completer: ChooseOption and give the data module options"
            )
        return _BoundGenerate(self, model, encoder)


class _BoundGenerate(BoundCompleter):
    def __init__(self, config: Generate, model: CausalLM, encoder: Encoder):
        self._config = config
        self._model = model
        self._virtual = virtual_tokens(model)
        self._encoder = encoder
        self._tokenizer = encoder.tokenizer
        self._ends = _end_tokens(base_model(model), encoder) | _tokens_with(encoder, config.stop)
        # One ASCII character is one token, or part of one: the table of end tokens finds all of them.
        self._divisible = tuple(text for text in config.stop if len(text.encode()) > 1)
        self._settings = GenerationConfig(
            max_new_tokens=config.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            eos_token_id=sorted(self._ends) or None,
            pad_token_id=encoder.tokenizer.pad_token_id,
        )

    def check(self, batch: Batch) -> None:
        for row, prompt in zip(batch.index, batch.prompts, strict=True):
            with naming_row(row):
                self._encoder.prompt(prompt, reserve=self._config.max_new_tokens)

    @torch.inference_mode()
    def complete(self, batch: Batch, *, seed: int) -> Completions:
        prompts = [self._encoder.prompt(prompt, reserve=self._config.max_new_tokens) for prompt in batch.prompts]
        inputs: dict[str, Any] = self._encoder.pad(prompts, self._model.device)
        del inputs["position_ids"]  # generate finds them from the mask
        model: Any = self._model  # PEFT's generate has no types
        if self._virtual is not None:
            model, inputs = self._virtual.base, self._virtual.in_front_of_ids(inputs)
        width = inputs["input_ids"].shape[1]
        with _nothing_inherited(base_model(self._model)):
            output = model.generate(
                **inputs,
                generation_config=self._settings,
                logits_processor=self._warpers(batch, seed, width),
                stopping_criteria=self._criteria(width),
            )
        assert isinstance(output, Tensor)
        ids = [self._until_end(row) for row in output[:, width:].tolist()]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        reasons = map(self._finish_reason, ids, texts)
        return Completions(tuple(map(self._cut, texts)), tuple(map(tuple, ids)), tuple(reasons))

    def _warpers(self, batch: Batch, seed: int, width: int) -> LogitsProcessorList:
        config = self._config
        if config.temperature == 0.0:
            return LogitsProcessorList()
        warpers: list[Any] = [TemperatureLogitsWarper(config.temperature)]
        if config.top_k is not None:
            warpers.append(TopKLogitsWarper(config.top_k))
        if config.top_p is not None:
            warpers.append(TopPLogitsWarper(config.top_p))
        return LogitsProcessorList([*warpers, KeyedGumbel(seed, batch.index, width)])

    def _criteria(self, width: int) -> StoppingCriteriaList:
        searched = [_StopInTail(self._tokenizer, self._divisible, width)] if self._divisible else []
        return StoppingCriteriaList(searched)

    def _until_end(self, ids: list[int]) -> list[int]:
        """The ids without what follows the first end token: padding, which not every tokenizer can tell from text."""
        first = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[: first + 1]

    def _finish_reason(self, ids: list[int], text: str) -> str:
        ended = bool(ids) and ids[-1] in self._ends
        return "stop" if ended or any(stop in text for stop in self._config.stop) else "length"

    def _cut(self, text: str) -> str:
        for stop in self._config.stop:
            text = text.split(stop, 1)[0]
        return text.strip()


class KeyedGumbel(LogitsProcessor):
    """Turns logits into ones whose largest entry is a draw from their softmax, as a function of keys alone.

    The noise of a vocabulary entry is Gumbel noise from a counter hash of (seed, sample, token position, vocabulary
    id); neither the batch a sample is in nor its place there matter. The hash has the same bits everywhere; the two
    logarithms may differ in the last bit of fp64 between devices.

    Args:
        seed: The seed of the step, shared by all its probes.
        index: The identity of the sample in each row.
        width: Tokens in the padded prompts.
    """

    def __init__(self, seed: int, index: Sequence[int], width: int):
        self._rows = [derive_seed(seed, sample) for sample in index]
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [N, V] plus noise, in fp64."""
        position = input_ids.shape[1] - self._width
        keys = torch.tensor([_int64(derive_seed(seed, position)) for seed in self._rows], device=scores.device)
        counters = torch.arange(scores.shape[1], device=scores.device) * _int64(GOLDEN)
        noisy = scores.double()
        size = max(1, CHUNK_ELEMENTS // scores.shape[1])
        for rows, some in zip(noisy.split(size), keys.split(size), strict=True):
            words = mix64(some[:, None] + counters)
            # 52 bits and a half: never 0, and never rounded up to 1, either of which would make the noise infinite.
            uniform = words.bitwise_right_shift_(12).bitwise_and_((1 << 52) - 1).double().add_(0.5).mul_(2.0**-52)
            rows.sub_(uniform.log_().neg_().log_())
        return noisy


class _StopInTail(StoppingCriteria):
    """Ends the rows whose new text ends in, or just went past, a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], width: int):
        self._tokenizer = tokenizer
        self._stop = stop
        self._width = width
        self._window = max(len(text.encode()) for text in stop) + 1  # a token is a byte or more

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """Which rows are done, bool [N]."""
        del scores, kwargs
        tails = input_ids[:, max(self._width, input_ids.shape[1] - self._window) :].tolist()
        texts = self._tokenizer.batch_decode(tails, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        done = torch.tensor([any(stop in text for stop in self._stop) for text in texts], device=input_ids.device)
        return cast(torch.BoolTensor, done)


@contextmanager
def _nothing_inherited(model: PreTrainedModel) -> Generator[None, None, None]:
    """Hide the checkpoint's generation defaults: ``generate`` fills every setting that is None from them."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: PreTrainedModel, encoder: Encoder) -> set[int]:
    """The ids that end a text, for the model (a chat model may have several) and the tokenizer."""
    own = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = own if isinstance(own, list) else [own]
    return {token for token in [*ids, encoder.tokenizer.eos_token_id] if isinstance(token, int)}


def _tokens_with(encoder: Encoder, stop: tuple[str, ...]) -> set[int]:
    """The ids of the vocabulary entries that contain a stop string."""
    if not stop:
        return set()
    every = [[token] for token in range(len(encoder.tokenizer))]
    texts = encoder.tokenizer.batch_decode(every, clean_up_tokenization_spaces=False)
    return {token for token, text in enumerate(texts) if any(string in text for string in stop)}


def _int64(word: int) -> int:
    """The int64 with the same 64 bits as an unsigned word."""
    return (word ^ (1 << 63)) - (1 << 63)
