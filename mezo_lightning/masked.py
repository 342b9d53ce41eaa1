"""Masked language models: a prompt with a mask in it, and how likely words are to stand there.

MeZO's RoBERTa experiments (Malladi et al., 2023, section 3.1) turn a classification into the filling of a mask, as
LM-BFF does (Gao, Fisch & Chen, 2021): "A great film. It was [MASK]." with *great* and *terrible* to choose from. In a
prompt the mask is written ``[MASK]``, whatever the tokenizer calls its own, and an option is written as it would stand
in the mask's place. There it has to be a single token: writing it may change that one token of the text and no other.

Rows are padded on the right: absolute positions, as BERT has them, count from the left.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mezo_lightning.encoding import CONTEXT_NAMES, Encoding, naming_row
from mezo_lightning.models.pretrained import base_model

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM

MASK = "[MASK]"
"""How a prompt says where the option belongs."""
_REMEMBERED = 1 << 14  # prompts, and pairs of a prompt and an option


@dataclass(frozen=True)
class Masked:
    """A text with a mask in it."""

    ids: tuple[int, ...]
    """Its tokens, special ones included."""
    place: int
    """Which of them is the mask."""


class MaskedEncoder:
    """Encodes prompts with a mask for one model.

    Args:
        model: A masked language model.
        tokenizer: A tokenizer with a mask token and a pad token.
        encoding: How text becomes tokens; special tokens are the tokenizer's own, at both ends.

    Raises:
        ValueError: If the tokenizer has no mask token, or ``encoding`` asks for what only causal models know.
    """

    def __init__(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, encoding: Encoding):
        _check(encoding)
        if tokenizer.mask_token is None:
            raise ValueError("the tokenizer has no mask token, so that nothing can be filled in; use the model's own")
        self._tokenizer = tokenizer
        self._context = _context(model)
        self._limit = encoding.max_length if self._context is None else min(encoding.max_length, self._context)
        self._max_length = encoding.max_length
        # Every probe of a step encodes the same batch again.
        self._prompts = lru_cache(maxsize=_REMEMBERED)(self._prompt)
        self._tokens = lru_cache(maxsize=_REMEMBERED)(self._token)

    def prompt(self, prompt: str) -> Masked:
        """The ids of a prompt, and where its mask is.

        Raises:
            ValueError: If it has no mask or several, or is too long.
        """
        return self._prompts(prompt)

    def token(self, prompt: str, option: str) -> int:
        """The token that an option is in the mask's place.

        Raises:
            ValueError: If it is none or several, or changes another token of the text.
        """
        return self._tokens(prompt, option)

    def check(self, index: Sequence[int], texts: Iterable[tuple[str, str]]) -> None:
        """Raise ValueError, naming the row, if a prompt and what is to stand in it cannot be encoded.

        Args:
            index: Row numbers, for the message.
            texts: The prompt and the option of each row.
        """
        for row, (prompt, option) in zip(index, texts, strict=True):
            with naming_row(row):
                self.token(prompt, option)

    def pad(self, rows: Sequence[Masked], device: torch.device) -> dict[str, Tensor]:
        """Rows as a right-padded batch: input_ids and attention_mask."""
        width = max(len(row.ids) for row in rows)
        pad: Any = self._tokenizer.pad_token_id
        ids = [row.ids + (pad,) * (width - len(row.ids)) for row in rows]
        mask = [(1,) * len(row.ids) + (0,) * (width - len(row.ids)) for row in rows]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
        return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}

    def _prompt(self, prompt: str) -> Masked:
        mask: Any = self._tokenizer.mask_token
        ids = self._encode(prompt.replace(MASK, mask))
        places = [place for place, token in enumerate(ids) if token == self._tokenizer.mask_token_id]
        if len(places) != 1:
            raise ValueError(
                f"the prompt {prompt!r} holds {len(places) or 'no'} masks: write {MASK} once into data.prompt, where "
                "the option belongs"
            )
        if len(ids) > self._limit:
            context = "no context limit" if self._context is None else f"a context of {self._context}"
            raise ValueError(
                f"a text of {len(ids)} tokens does not fit: the limit is {self._limit} (max_length={self._max_length}, "
                f"the model has {context}); shorten the text"
            )
        return Masked(ids, places[0])

    def _token(self, prompt: str, option: str) -> int:
        if not option.strip():
            raise ValueError(f"the option {option!r} is empty; write a word that may stand in the place of {MASK}")
        masked, filled = self.prompt(prompt).ids, self._encode(prompt.replace(MASK, option))
        before = _shared(masked, filled)
        after = _shared(masked[before:][::-1], filled[before:][::-1])
        replaced, inside = masked[before : len(masked) - after], filled[before : len(filled) - after]
        if len(replaced) != 1 or len(inside) != 1:
            raise ValueError(
                f"the option {option!r} must be a single token in the place of {MASK}: in {prompt!r} it turns "
                f"{self._spelled(replaced)} into {self._spelled(inside)}; choose another word, and mind the spaces "
                f"around {MASK}"
            )
        if inside[0] == self._tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer does not know the option {option!r}; choose another word")
        return inside[0]

    def _spelled(self, ids: Sequence[int]) -> str:
        return f"[{', '.join(f'{token} {self._tokenizer.convert_ids_to_tokens(token)!r}' for token in ids)}]"

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, verbose=False))


def mask_logits(model: CausalLM, inputs: dict[str, Tensor], places: Sequence[int]) -> Tensor:
    """The scores of all tokens in the place of the mask: [N, vocabulary], in the model's dtype.

    The layer that makes them sees the masked places alone: the scores of all the others would be most of the work and
    of the memory of a batch.

    Args:
        model: A masked language model; run at the weights that it has.
        inputs: input_ids and attention_mask, [N, tokens].
        places: Where the mask is in each row.
    """
    head: Any = base_model(model).get_output_embeddings()
    with _seeing_only(head, torch.tensor(places, device=inputs["input_ids"].device)):
        logits = model(**inputs).logits
    if logits.shape[1] == 1:
        return logits[:, 0]
    return logits[range(len(places)), list(places)]  # of a head that does not call the layer, such as MobileBERT's


@contextmanager
def _seeing_only(head: nn.Module, places: Tensor) -> Generator[None, None, None]:
    def pick(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        hidden, *rest = args
        rows = torch.arange(len(places), device=places.device)
        return hidden[rows, places][:, None], *rest

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts have in common from their start."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _check(encoding: Encoding) -> None:
    """Refuse what has no meaning where nothing is written."""
    for field, value, plain in (
        ("chat", encoding.chat, False),
        ("bos_token_id", encoding.bos_token_id, None),
        ("truncate", encoding.truncate, False),
    ):
        if value != plain:
            raise ValueError(f"encoding: {field}={value} is for causal models; leave it out with a masked one")


def _context(model: CausalLM) -> int | None:
    """The longest sequence that a model takes; None where it has no limit of its own."""
    base = base_model(model)
    sizes = base.config.to_dict()
    longest: int | None = next((sizes[name] for name in CONTEXT_NAMES if sizes.get(name)), None)
    if longest is None:
        return None
    for module in base.modules():
        # RoBERTa counts positions from behind the one that stands for padding.
        if isinstance(module, nn.Embedding) and module.num_embeddings == longest and module.padding_idx is not None:
            return longest - module.padding_idx - 1
    return longest
