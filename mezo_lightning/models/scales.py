"""Tuning the scales of a quantised base, while its codes stay as they are (QZO: Shang et al. 2025, arXiv 2505.13430).

bitsandbytes keeps a weight as codes with a scale for each block of codes (4 bits) or for each row (8 bits). A layer
whose scales are tuned computes with ``scale * exp(log_scale)``; its ``log_scales`` are a parameter like any other, zero
at the start, so that evaluators, optimizers, checkpoints and replay need to know nothing of them.

QZO moves the scales themselves, all equally far, and sets those to zero that would become negative. Here each moves in
proportion to itself, for scales differ in size; none can change its sign; and a step stays linear in the parameters,
as a trajectory has it. An epsilon of 0.1 is about 10 % of every scale. (QZO clips projected gradients too: that is
``transform: Clip``.)

``log_scales`` have the dtype of the model's other weights, which near zero is fine enough in 16 bits as well; the
products are fp32. Only import this where there is something that bitsandbytes has quantised.
"""

from __future__ import annotations

import copy
import re
from typing import Any, TypeVar

import torch
from bitsandbytes import matmul, matmul_4bit  # pyright: ignore[reportPrivateImportUsage]
from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt, fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class Scaled4bit(Linear4bit):
    """A 4-bit layer with a tuned scale for each block of its weight, in row-major order."""

    log_scales: nn.Parameter
    weight: Any

    @property
    def scales(self) -> Tensor:
        """Of the base: fp32 [blocks]."""
        fix_4bit_weight_quant_state_from_module(self)  # a move to another device may have lost it
        return self.weight.quant_state.absmax

    def forward(self, x: Tensor) -> Tensor:
        scales = _tuned(self.scales, self.log_scales)
        state = copy.copy(self.weight.quant_state)
        state.absmax = scales
        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return matmul_4bit(x.to(dtype), self.weight, bias=bias, quant_state=state).to(x.dtype)


class Scaled8bit(Linear8bitLt):
    """An 8-bit layer with a tuned scale for each row of its weight."""

    log_scales: nn.Parameter
    weight: Any

    @property
    def scales(self) -> Tensor:
        """Of the base: fp32 [rows]."""
        scales = self.state.SCB if self.weight.SCB is None else self.weight.SCB
        assert scales is not None
        return scales

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.CB is not None:
            self.init_8bit_state()
        state = copy.copy(self.state)
        state.SCB = _tuned(self.scales, self.log_scales)
        state.is_training = False
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return matmul(x, self.weight, bias=bias, state=state)


def add_scales(model: nn.Module, pattern: str) -> None:
    """Give quantised layers a parameter ``log_scales``.

    Args:
        model: A model that bitsandbytes has quantised; changed, but computes what it did.
        pattern: A regular expression; only where it is found in the parameter's name, a layer gets one.

    Raises:
        ValueError: If the scales are quantised as well.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    for name, module in model.named_modules():
        if not isinstance(module, (Linear4bit, Linear8bitLt)) or module.weight.is_floating_point():
            continue
        if not re.search(pattern, f"{name}.log_scales"):
            continue
        _become(Scaled4bit if isinstance(module, Linear4bit) else Scaled8bit, module)
        assert isinstance(module, (Scaled4bit, Scaled8bit))
        if not module.scales.is_floating_point():
            raise ValueError(
                f"quantization: bnb_4bit_use_double_quant quantises scales as well, so that {name + '.log_scales'!r} "
                "cannot be tuned; leave it out"
            )
        module.log_scales = nn.Parameter(torch.zeros_like(module.scales, dtype=dtype))


def folded(model: Model) -> Model:
    """A copy of a model, quantised like any other, whose scales are what was tuned."""
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, (Scaled4bit, Scaled8bit)):
            module.scales.copy_(_tuned(module.scales, module.log_scales))
            del module.log_scales
            _become(Linear4bit if isinstance(module, Scaled4bit) else Linear8bitLt, module)
    return copied


def _become(kind: type[nn.Module], module: nn.Module) -> None:
    module.__class__ = kind


def _tuned(scales: Tensor, log_scales: Tensor) -> Tensor:
    return scales * log_scales.detach().to(torch.float32).exp()
