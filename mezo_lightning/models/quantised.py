"""Quantised base weights, which an adapter or a few dense weights are tuned on top of (QLoRA: Dettmers et al., 2023).

transformers quantises while it loads, by any of its own configurations. The base is a function of the model's name and
that configuration, so that a replay finds it again. What is quantised cannot be perturbed and stays frozen: a
checkpoint holds it all the same, and is refused where the model has been quantised otherwise. An export is dense again,
unless it is the scales of the quantised weights that were tuned (``scales.py``).

A quantised forward is coarse. On a small OPT with bitsandbytes, projected gradients at an epsilon of 1e-3 were off by
15 to 30 %: hence ``SMALL_EPSILON``.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers.utils.quantization_config import QuantizationConfigMixin

SMALL_EPSILON = 3e-3
"""Below this, the two probes of a direction differ by little more than a quantised forward's own coarseness."""


@contextmanager
def plain_tensors() -> Iterator[None]:
    """New tensors in fp32 on the CPU, whatever defaults Lightning sets: bf16-true would round what codes stand for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def quantisation_of(quantization: Mapping[str, Any], dtype: torch.dtype) -> QuantizationConfigMixin:
    """The transformers configuration.

    Args:
        quantization: Its fields, ``quant_method`` among them.
        dtype: Of the dense weights; 4-bit layers of bitsandbytes compute in it unless they are told otherwise, for
            they would turn their biases into the dtype that they compute in.

    Raises:
        ValueError: If there is no such method, or it has no such field, or a package is missing.
    """
    if "quant_method" not in quantization:
        raise ValueError(
            f"quantization={dict(quantization)} names no quant_method; write for example quant_method: bitsandbytes, "
            "load_in_4bit: true"
        )
    fields = dict(quantization)
    if fields["quant_method"] == "bitsandbytes":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("quantization needs bitsandbytes; install it with `pip install mezo-lightning[quantised]`")
        if not fields.get("load_in_4bit") and not fields.get("load_in_8bit"):
            raise ValueError("quantization: bitsandbytes needs load_in_4bit: true or load_in_8bit: true")
        if fields.get("load_in_4bit"):
            fields.setdefault("bnb_4bit_compute_dtype", str(dtype).removeprefix("torch."))
    try:
        config = AutoQuantizationConfig.from_dict(dict(fields))
    except (TypeError, ValueError) as error:
        raise ValueError(f"quantization={dict(quantization)} is no quantisation configuration: {error}") from error
    unknown = sorted(fields.keys() - config.to_dict().keys())
    if unknown:
        raise ValueError(f"quantization: {type(config).__name__} has no field {unknown[0]!r}")
    return config


def quantise(model: PreTrainedModel, config: QuantizationConfigMixin) -> PreTrainedModel:
    """A dense model's weights, quantised: for sources that transformers cannot quantise while it loads them.

    Args:
        model: The dense model, whose weights are left as they are.
        config: How to quantise.
    """
    plain = copy.deepcopy(model.config)
    result = type(model).from_pretrained(
        None,  # pyright: ignore[reportArgumentType]
        config=plain,
        state_dict=model.state_dict(),
        quantization_config=config,
        dtype=model.dtype,
        device_map={"": "cpu"},
    )
    result.generation_config = model.generation_config
    result.name_or_path = model.name_or_path
    return result


def guard(model: nn.Module) -> None:
    """Have a model refuse checkpoints in which its quantised layers are not what they are here.

    bitsandbytes saves what its codes mean beside them, and cannot load that again; nor need it, where it is the same.
    """
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_news)
    for module in model.modules():
        if any(not p.is_floating_point() for p in module.parameters(recurse=False)):
            module.register_load_state_dict_pre_hook(_compare)


def keep_layout(model: nn.Module) -> None:
    """Have 4-bit layers of bitsandbytes compute with their weights as they are.

    On a CPU with AVX512-BF16 they would repack them at the first forward, and round their scales to bf16, which they
    then save in another shape than they were in: no checkpoint would fit.
    """
    from bitsandbytes.nn.modules import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def quantised_names(model: nn.Module) -> list[str]:
    """The parameters of a model that hold codes instead of numbers."""
    return [name for name, p in model.named_parameters() if not p.is_floating_point()]


def has_tuned_scales(model: nn.Module) -> bool:
    """Whether scales of quantised weights are among a model's parameters."""
    return any(name.endswith(".log_scales") for name, _ in model.named_parameters())


def dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a quantised model with the dense weights that its codes stand for."""
    return cast(PreTrainedModel, copy.deepcopy(model).dequantize(dtype=model.dtype))


def dense_adapter(model: PeftModel) -> PeftModel:
    """A copy of a model with an adapter on a quantised base, the base dense again, so that they can be merged.

    PEFT would merge into the codes: what an adapter adds is less than they can tell apart.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = dense_model(cast(PreTrainedModel, copy.deepcopy(model).unload()))  # pyright: ignore[reportCallIssue]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between PEFT and transformers
        wrapped = get_peft_model(base, copy.deepcopy(model.active_peft_config), autocast_adapter_dtype=False)
    set_peft_model_state_dict(wrapped, get_peft_model_state_dict(model))
    return cast("PeftModel", wrapped.to(base.dtype).eval())


def warn_of_small_epsilon(epsilon: float) -> None:
    """Say that an epsilon is small for a quantised base, if it is."""
    if epsilon < SMALL_EPSILON:
        warnings.warn(
            f"epsilon={epsilon:g} is small for a quantised base: the two probes of a direction then differ by little "
            f"more than what quantised layers round off; use {SMALL_EPSILON:g} or more",
            stacklevel=2,
        )


def _compare(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before a quantised layer is loaded: refuse other contents, and take away what it cannot load."""
    del rest
    own = module.state_dict(prefix=prefix)
    loadable = {prefix + name for name in (*module._parameters, *module._buffers)}
    for name in [name for name in state if name.startswith(prefix)]:
        if name in loadable and own[name].is_floating_point():
            continue  # a bias, say
        if name not in own or not torch.equal(own[name].cpu(), state[name].cpu()):
            raise ValueError(
                f"the checkpoint's base was quantised otherwise than this model's ({name!r} differs); use the "
                "model.pretrained that the checkpoint was made with"
            )
        if name not in loadable:
            del state[name]


def _is_news(record: logging.LogRecord) -> bool:
    """8-bit layers say at every call that they compute in fp16."""
    return "inputs will be cast" not in record.getMessage()
