"""The two kinds of language model: causal ones write a text on, masked ones fill in a mask.

Its user says which of them a checkpoint is, and nothing is guessed: transformers opens RoBERTa as a causal model too,
and what it then writes is noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

Kind = Literal["causal", "masked"]

_MASKED = "ForMaskedLM"  # so transformers ends the names of encoders that fill in masks
_MIX_IN_PADDING = ("convbert", "fnet", "nystromformer")
_OTHERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def auto_class(kind: Kind, name: str, source: str, options: Mapping[str, Any]) -> Any:
    """The class of transformers whose ``from_pretrained`` opens a checkpoint as a model of this kind.

    Args:
        kind: What the user says that it is.
        name: What the user calls it, for messages.
        source: Folder or Hub id.
        options: ``gguf_file``, ``revision`` and ``trust_remote_code``; others are not looked at.

    Raises:
        ValueError: If the checkpoint is of the other kind, or of neither.
    """
    if options.get("gguf_file"):
        if kind == "masked":
            raise ValueError(f"kind='masked' does not suit name={name!r}, a GGUF file; use one of safetensors")
        return AutoModelForCausalLM
    where = {"revision": options["revision"], "trust_remote_code": options["trust_remote_code"]}
    return auto_class_of(kind, name, AutoConfig.from_pretrained(source, **where))


def auto_class_of(kind: Kind, name: str, config: PretrainedConfig) -> Any:
    """See ``auto_class``; for a configuration that has been read."""
    saved_as = list(config.architectures or [])
    what = saved_as[0] if saved_as else f"model of type {config.model_type}"
    if kind == "causal":
        if any(architecture.endswith(_MASKED) for architecture in saved_as):
            raise ValueError(
                f"kind='causal' does not suit name={name!r}, a {what}: it fills in masks, and does not write; set "
                "model.pretrained.kind: masked, and write [MASK] into data.prompt where the option belongs"
            )
        return AutoModelForCausalLM
    if config.model_type in _MIX_IN_PADDING:
        raise ValueError(
            f"kind='masked' does not suit name={name!r}, a {what}: what it fills in depends on the padding of a batch; "
            "use one of the kind of BERT or RoBERTa"
        )
    if any(architecture.endswith(_OTHERS) for architecture in saved_as) or not _fills_masks(config):
        raise ValueError(
            f"kind='masked' does not suit name={name!r}, a {what}: it is no encoder that fills in masks, as BERT and "
            "RoBERTa are; set model.pretrained.kind: causal if it writes"
        )
    return AutoModelForMaskedLM


def adapter_for(kind: Kind, adapter: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT configuration that suits a model of this kind; PEFT knows no task of filling in masks.

    Raises:
        ValueError: If it has virtual tokens, and the model is a masked one.
    """
    if kind == "causal":
        return dict(adapter)
    if "num_virtual_tokens" in adapter:
        raise ValueError(
            f"adapter: {adapter.get('peft_type')} puts virtual tokens in front of causal models only; with kind: masked"
            " use LORA"
        )
    return {"task_type": None, **adapter}


def is_masked(model: PreTrainedModel) -> bool:
    """Whether a model fills in masks, and does not write."""
    return type(model).__name__.endswith(_MASKED)


def _fills_masks(config: PretrainedConfig) -> bool:
    known: Any = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)  # BART is among them, which has a decoder
    if known is not None:
        return known.__name__.endswith(_MASKED)
    return "AutoModelForMaskedLM" in config.to_dict().get("auto_map", {})
