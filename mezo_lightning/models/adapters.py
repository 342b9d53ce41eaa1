"""Adapters of PEFT's on top of a base model: put on, and merged into its weights again.

An adapter starts from a fixed seed and in the dtype of the base, so that a replay finds the very same starting point;
PEFT by itself draws from the global generator and keeps adapters in fp32.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel

from mezo_lightning.mistakes import nearest
from mezo_lightning.models.quantised import dense_adapter, dense_model, plain_tensors, quantised_names
from mezo_lightning.models.virtual_tokens import (
    PREFIX,
    check_attention,
    check_virtual_tokens,
    real_activations,
    set_sizes,
    start_from,
)

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from mezo_lightning.models.pretrained import CausalLM

ADAPTER_SEED = 0
"""Every adapter starts from the same draw, so that base + trajectory is enough to replay."""


def adapter_config(adapter: dict[str, Any]) -> PeftConfig:
    """The PEFT configuration of an adapter.

    Raises:
        ValueError: If PEFT is missing, or it is none, or one that cannot be tuned.
    """
    try:
        from peft import PEFT_TYPE_TO_CONFIG_MAPPING, get_peft_config
    except ImportError as error:
        raise ValueError("adapter needs PEFT; install it with `pip install mezo-lightning[peft]`") from error
    if "peft_type" not in adapter:
        raise ValueError(f"adapter={adapter} names no peft_type; write for example peft_type: LORA")
    known = {kind.value: config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = str(adapter["peft_type"])
    if kind not in known:
        raise ValueError(f"adapter: peft_type {kind} is unknown: choose {', '.join(known)}{nearest(kind, list(known))}")
    fields = [field.name for field in dataclasses.fields(known[kind])]
    for name in adapter:
        if name not in fields:
            raise ValueError(f"adapter: {kind} has no {name!r}{_meant(name, fields)}")
    defaults: dict[str, Any] = {"task_type": "CAUSAL_LM", "inference_mode": False}
    if adapter["peft_type"] == "PROMPT_TUNING":
        defaults["prompt_tuning_init"] = "SAMPLE_VOCAB"  # PEFT's noise of std 1 is far from any word
    try:
        config = get_peft_config({**defaults, **adapter})
    except (KeyError, TypeError) as error:
        raise ValueError(f"adapter={adapter} is no PEFT configuration: {error}") from error
    if config.is_prompt_learning:
        check_virtual_tokens(adapter)
    return config


def with_adapter(model: PreTrainedModel, adapter: dict[str, Any]) -> PeftModel:
    """The model with an adapter on top, the only thing that is trainable, in the dtype of the model.

    Args:
        model: The base, in eval mode; changed, as PEFT does.
        adapter: A PEFT configuration.
    """
    config = adapter_config(adapter)
    activations = None
    if config.is_prompt_learning:
        check_attention(model, adapter["peft_type"])
        if adapter["peft_type"] == PREFIX:
            activations = real_activations(model, adapter["num_virtual_tokens"], ADAPTER_SEED)
            set_sizes(config, len(activations), activations.shape[2], activations.shape[4])
        else:  # embeddings belong to no layer and have no heads, but PEFT asks for them
            embeddings: Any = model.get_input_embeddings()
            set_sizes(config, 1, 1, embeddings.weight.shape[1])
    with plain_tensors(), torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(ADAPTER_SEED)  # torch.manual_seed would reseed the GPUs too
        wrapped = _put_on(model, config)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(model.dtype)
    if activations is not None:
        start_from(wrapped, activations)
    return wrapped


def merged(model: CausalLM) -> CausalLM:
    """A model without an adapter, with dense weights, that computes what this one does; this one is not changed.

    Virtual tokens cannot be merged into weights: a model that has some is returned as it is.
    """
    if isinstance(model, PreTrainedModel):
        return dense_model(model) if quantised_names(model) else model
    if model.active_peft_config.is_prompt_learning:
        return model
    copied = dense_adapter(model) if quantised_names(model) else copy.deepcopy(model)
    return cast(PreTrainedModel, copied.merge_and_unload())  # pyright: ignore[reportCallIssue]


def _meant(name: str, fields: list[str]) -> str:
    return "; the rank is called r" if name == "rank" and "r" in fields else nearest(name, fields)


def _put_on(model: PreTrainedModel, config: PeftConfig) -> PeftModel:
    from peft import get_peft_model

    try:
        return cast("PeftModel", get_peft_model(model, config, autocast_adapter_dtype=False))
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        matrices = (
            name for name, module in model.named_modules() if getattr(module, "weight", torch.empty(0)).ndim == 2
        )
        names = list(dict.fromkeys(name.rpartition(".")[2] for name in matrices))
        given = getattr(config, "target_modules", None)
        wanted = sorted(given) if isinstance(given, set | list) else given
        raise ValueError(
            f"adapter: target_modules: {wanted} does not fit {type(model).__name__}, whose matrices are called "
            f"{', '.join(names[:12])}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between PEFT and transformers
        yield
