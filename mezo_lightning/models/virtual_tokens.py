"""Virtual tokens: what prefix and prompt tuning put in front of every text, as entries of the model's own cache.

Prefix tuning (Li & Liang, 2021) learns the keys and values of P tokens that nobody writes, prompt tuning (Lester et
al., 2021) learns their embeddings. The parameters are PEFT's. Its way of running them is not used: it joins the tokens
to a batch as it comes, so that padding stands between them and a prompt, and an answer depends on the batch; MeZO's
own code (Malladi et al., 2023) lets the positions jump by P between prompt and answer. Here virtual tokens are a cache
of P entries that all rows share; prompt tuning's embeddings become one in a forward of their own. A text stands at the
positions P, P + 1, ..., wherever its padding is.

As in MeZO, a prefix starts from real activations: the keys and values of P tokens drawn at random from the vocabulary,
run as one text. It is these that make prefix tuning work at all (its appendix E.5, and Table 17 for backpropagation).
The same machine finds the same bits again; another may not, for they come out of matrix products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from mezo_lightning.models.pretrained import CausalLM

PREFIX, PROMPT = "PREFIX_TUNING", "PROMPT_TUNING"
_FOUND = ("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules")
"""Sizes that are read off the model."""
_COUNTS_PLACES = ("sliding_window", "window_size")
"""Settings of models that attend to the nearest places of the cache, padding included."""


class VirtualTokens:
    """The virtual tokens of a model, at the weights that it has when asked.

    Args:
        model: A causal LM with a prefix or a prompt of PEFT's.
    """

    def __init__(self, model: PeftModel):
        self._model = model
        self.base = cast(PreTrainedModel, model.get_base_model())
        """Takes what ``in_front`` and ``in_front_of_ids`` make; the PEFT model around it would add the tokens again."""
        self.count = count_virtual_tokens(model)
        """How many there are, P."""

    def in_front(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What the model is to be called with for the texts of a batch.

        Args:
            batch: input_ids, attention_mask and perhaps position_ids, [N, L] each.

        Returns:
            The same ids at later positions, a mask [N, P + L], and the cache that they follow.
        """
        shifted = {"position_ids": batch["position_ids"] + self.count} if "position_ids" in batch else {}
        rows = batch["input_ids"].shape[0]
        mask = self._ones_before(batch["attention_mask"])
        return {**batch, **shifted, "attention_mask": mask, "past_key_values": self.cache(rows)}

    def in_front_of_ids(self, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """What ``generate`` is to be called with: it takes a cache for that of the first ids, which it does not run.

        Args:
            batch: input_ids and attention_mask, [N, L] each; positions are its own affair.

        Returns:
            Ids [N, P + L], the first P of which mean nothing, a mask of this shape, and the cache of these P.
        """
        ids = batch["input_ids"]
        ids = torch.cat([ids.new_zeros(ids.shape[0], self.count), ids], dim=-1)
        mask = self._ones_before(batch["attention_mask"])
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": self.cache(ids.shape[0])}

    def cache(self, rows: int) -> Cache:
        """A new cache with the keys and values of the virtual tokens for each of so many rows."""
        found = self._model.get_prompt(batch_size=1)
        if isinstance(found, Tensor):
            found = self.base.base_model(inputs_embeds=found.to(self.base.dtype), use_cache=True).past_key_values
        assert isinstance(found, Cache)
        found.batch_repeat_interleave(rows)
        return found

    def _ones_before(self, mask: Tensor) -> Tensor:
        return torch.cat([mask.new_ones(mask.shape[0], self.count), mask], dim=-1)


def virtual_tokens(model: CausalLM) -> VirtualTokens | None:
    """The virtual tokens of a model; None where it has none."""
    return VirtualTokens(cast("PeftModel", model)) if count_virtual_tokens(model) else None


def count_virtual_tokens(model: CausalLM) -> int:
    """How many virtual tokens stand in front of every text."""
    if isinstance(model, PreTrainedModel) or not model.active_peft_config.is_prompt_learning:
        return 0
    return int(model.active_peft_config.num_virtual_tokens)  # pyright: ignore[reportAttributeAccessIssue]


def check_virtual_tokens(adapter: Mapping[str, Any]) -> None:
    """Refuse virtual tokens of a kind that is not supported.

    Args:
        adapter: A PEFT configuration of them, as the user wrote it.

    Raises:
        ValueError: If it is another than prefix or prompt tuning, or has settings that cannot work.
    """
    kind = str(adapter["peft_type"])
    if kind not in (PREFIX, PROMPT):
        raise ValueError(
            f"adapter: peft_type {kind} is not supported; of those with virtual tokens, use {PREFIX} or {PROMPT}"
        )
    count = adapter.get("num_virtual_tokens")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"adapter: num_virtual_tokens={count} must be at least 1; MeZO takes 5 for a prefix")
    for name in _FOUND:
        if name in adapter:
            raise ValueError(f"adapter: {name} is read off the model; leave it out")
    if adapter.get("prefix_projection"):
        raise ValueError(
            "adapter: prefix_projection hides the prefix behind a network, which cannot start from real activations; "
            "leave it out"
        )


def check_attention(model: PreTrainedModel, kind: str) -> None:
    """Refuse a model whose attention counts places in the cache, between which padding stands, and not positions.

    Args:
        model: The base.
        kind: PEFT's name for the virtual tokens, for the message.

    Raises:
        ValueError: If it does.
    """
    settings = model.config.get_text_config().to_dict()
    windowed = settings.get("use_sliding_window", True) and any(settings.get(name) for name in _COUNTS_PLACES)
    if windowed or settings.get("model_type") == "mpt":
        raise ValueError(
            f"adapter: peft_type {kind} does not suit a {type(model).__name__}: padding between virtual tokens and "
            "text would count as distance in its attention, and answers would depend on the batch; use LORA"
        )


@torch.no_grad()
def real_activations(model: PreTrainedModel, count: int, seed: int) -> Tensor:
    """The keys and values that a model has for some tokens of its vocabulary, drawn at random and run as one text.

    Args:
        model: In eval mode.
        count: How many tokens, P.
        seed: Of the draw.

    Returns:
        [layers, 2, heads, P, width], keys before values, in the dtype of the model.

    Raises:
        ValueError: If the model keeps no such cache, or its layers are not alike.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, count), generator=torch.Generator().manual_seed(seed)).to(model.device)
    cache = model.base_model(input_ids=ids, use_cache=True).get("past_key_values")
    layers = cast("Sequence[Any]", cache.layers) if isinstance(cache, Cache) else []
    pairs = [(layer.keys, layer.values) for layer in layers]
    shapes = {tensor.shape if isinstance(tensor, Tensor) else None for pair in pairs for tensor in pair}
    if len(shapes) != 1 or None in shapes:
        raise ValueError(
            f"adapter: {PREFIX} needs a model whose layers all keep keys and values of one shape, and "
            f"{type(model).__name__} does not; use {PROMPT} or LORA"
        )
    return torch.stack([torch.cat(pair) for pair in pairs])


def set_sizes(config: PeftConfig, layers: int, heads: int, width: int) -> None:
    """Tell PEFT the sizes of virtual tokens, which it would guess from the model's configuration."""
    config.num_layers = layers  # pyright: ignore[reportAttributeAccessIssue]
    config.num_attention_heads = heads  # pyright: ignore[reportAttributeAccessIssue]
    config.token_dim = heads * width  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def start_from(model: PeftModel, activations: Tensor) -> None:
    """Make the prefix of a model these keys and values: [layers, 2, heads, P, width]."""
    encoder: Any = model.prompt_encoder[model.active_adapter]  # pyright: ignore[reportIndexIssue, reportArgumentType]
    weight: Tensor = encoder.embedding.weight
    weight.copy_(activations.permute(3, 0, 1, 2, 4).reshape(weight.shape))
