"""Text to token ids: prompts, prompts with a continuation, and left-padded batches of them.

The rules are MeZO's (Malladi et al., 2023): prompt and continuation are tokenised together, and the continuation is the
last ``len(encode(prompt + target)) - len(encode(prompt))`` tokens; rows are padded on the left, so that continuations
line up at the right. We deviate in two things. Special tokens go in front only (a tokenizer that also ends its texts
with one would have the model continue after the end), and a text too long for the model is an error unless truncation
is asked for, where MeZO cuts it from the left in silence.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo_lightning.models.pretrained import base_model
from mezo_lightning.models.virtual_tokens import count_virtual_tokens

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
"""What configurations call the longest sequence that the model was made for."""


@dataclass(frozen=True)
class Encoding:
    """How text becomes token ids."""

    max_length: int = 2048
    """longest sequence in tokens, continuation included; the model's own context is the limit where it is shorter"""
    bos_token_id: int | None = None
    """id to start every prompt with; null: the tokenizer's own default. MeZO starts OPT's prompts with 0"""
    chat: bool = False
    """wrap each prompt as a user's message in the tokenizer's chat template"""
    system: str | None = None
    """system message in front of each prompt, with chat"""
    truncate: bool = False
    """cut prompts that are too long from the left, behind the start token, instead of refusing them"""

    def __post_init__(self) -> None:
        """Refuse combinations in which a field would be ignored."""
        if self.max_length < 2:
            raise ValueError(f"max_length={self.max_length} must be at least 2")
        if self.system is not None and not self.chat:
            raise ValueError("system needs chat: true; without a chat template, write it into the prompt")
        if self.chat and self.bos_token_id is not None:
            raise ValueError(f"bos_token_id={self.bos_token_id} contradicts chat: true, whose template starts the text")
        if self.chat and self.truncate:
            raise ValueError("truncate would cut off the head of the chat template; shorten the prompts in the data")

    def bind(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """The encoder of one model."""
        config = base_model(model).config.get_text_config()
        if self.bos_token_id is not None and not 0 <= self.bos_token_id < config.vocab_size:
            raise ValueError(f"bos_token_id={self.bos_token_id} is not in the vocabulary of {config.vocab_size} tokens")
        sizes = config.to_dict()
        context = next((sizes[name] for name in CONTEXT_NAMES if sizes.get(name)), None)
        return Encoder(self, tokenizer, context, count_virtual_tokens(model))


@dataclass(frozen=True)
class Continued:
    """A prompt with the text that follows it."""

    ids: tuple[int, ...]
    """Tokens of both."""
    target_length: int
    """How many of them, at the end, belong to the text that follows."""

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The tokens of the text that follows."""
        return self.ids[len(self.ids) - self.target_length :]


class Encoder:
    """Encodes texts for one model.

    Args:
        encoding: The rules.
        tokenizer: A tokenizer with a pad token.
        context: The longest sequence that the model takes; None where it has no limit of its own.
        virtual_tokens: How many of its places stand in front of every text.
    """

    def __init__(
        self, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, context: int | None, virtual_tokens: int = 0
    ):
        if encoding.chat and not tokenizer.chat_template:
            raise ValueError("chat: true needs a tokenizer with a chat template, which this one lacks; use chat: false")
        assert tokenizer.pad_token_id is not None
        self.encoding = encoding
        self.tokenizer = tokenizer
        self.limit = encoding.max_length if context is None else min(encoding.max_length, context - virtual_tokens)
        self._context = context
        self._virtual_tokens = virtual_tokens
        self._prefix = self._special_prefix()
        # Every probe of a step encodes the same batch again.
        self._tokenise = lru_cache(maxsize=1024)(self._tokenise_uncached)

    def prompt(self, prompt: str, reserve: int = 0) -> tuple[int, ...]:
        """The ids of a prompt.

        Args:
            prompt: The text.
            reserve: Tokens to leave free for what is generated.
        """
        if reserve >= self.limit:
            raise ValueError(f"{reserve} tokens for the answer leave no room for a prompt: {self._limit_in_words()}")
        ids = self._fit(self._tokenise(self._render(prompt)), self.limit - reserve, f"{reserve} more for the answer")
        if not ids:
            raise ValueError("the prompt is empty and no start token is set; write a prompt, or set bos_token_id")
        return ids

    def continued(self, prompt: str, target: str) -> Continued:
        """The ids of a prompt and the text that follows it."""
        text = self._render(prompt)
        prompt_length = len(self._tokenise(text))
        ids = self._tokenise(text + target)
        target_length = len(ids) - prompt_length
        if target_length < 1:
            raise ValueError(f"the target {target!r} adds no token to its prompt")
        ids = self._fit(ids, self.limit, f"{target_length} of them the target's")
        if len(ids) < 2:
            raise ValueError(f"nothing precedes the target {target!r}; write a prompt, or set bos_token_id")
        # The first token of a sequence is predicted from nothing.
        return Continued(ids, min(target_length, len(ids) - 1))

    def check(self, index: Sequence[int], texts: Iterable[tuple[str, str]]) -> None:
        """Raise ValueError, naming the row, if a prompt and its target cannot be encoded.

        Args:
            index: Row numbers, for the message.
            texts: The prompt and target of each row.
        """
        for row, (prompt, target) in zip(index, texts, strict=True):
            with naming_row(row):
                self.continued(prompt, target)

    def pad(self, rows: Sequence[tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        """Rows of ids as a left-padded batch: input_ids, attention_mask and position_ids."""
        width = max(map(len, rows))
        pad: Any = self.tokenizer.pad_token_id
        ids = torch.tensor([(pad,) * (width - len(row)) + row for row in rows], dtype=torch.int64)
        mask = torch.tensor([(0,) * (width - len(row)) + (1,) * len(row) for row in rows], dtype=torch.int64)
        positions = (mask.cumsum(-1) - 1).clamp_(min=0)
        batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _render(self, prompt: str) -> str:
        if not self.encoding.chat:
            return prompt
        system = self.encoding.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def _tokenise_uncached(self, text: str) -> tuple[int, ...]:
        return self._prefix + tuple(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _special_prefix(self) -> tuple[int, ...]:
        """What goes in front of every text; a chat template brings its own special tokens along."""
        if self.encoding.chat:
            return ()
        if self.encoding.bos_token_id is not None:
            return (self.encoding.bos_token_id,)
        bare = self.tokenizer.encode("a", add_special_tokens=False)
        full = self.tokenizer.encode("a")
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return tuple(full[: starts[0]]) if starts else ()

    def _fit(self, ids: tuple[int, ...], limit: int, what: str) -> tuple[int, ...]:
        if len(ids) <= limit:
            return ids
        if not self.encoding.truncate:
            advice = "shorten the text" if self.encoding.chat else "shorten the text, or set truncate: true"
            raise ValueError(f"a text of {len(ids)} tokens ({what}) does not fit: {self._limit_in_words()}; {advice}")
        kept = limit - len(self._prefix)
        if kept < 1:
            raise ValueError(f"nothing of the prompt is left after truncation: {self._limit_in_words()}")
        return self._prefix + ids[-kept:]

    def _limit_in_words(self) -> str:
        context = "no context limit" if self._context is None else f"a context of {self._context}"
        if self._virtual_tokens:
            context += f", {self._virtual_tokens} of them for virtual tokens"
        return f"the limit is {self.limit} tokens (max_length={self.encoding.max_length}, the model has {context})"


@contextmanager
def naming_row(row: int) -> Generator[None, None, None]:
    """Put a row's number in front of the message of a ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"row {row}: {error}") from None
