"""An initialisation that can copy: a hand-wired induction circuit in the first two layers of a small OPT.

To look a fact up in a story is induction: find where `Ella came from` stood before, and go on as it went on there.
Small models with learned positions take very long to discover it from text; started from plain random weights, ours had
not within the steps that the build takes. Wired like this it copies before the first step, and pre-training can get on
with everything else. The circuit (Olsson et al., 2022, arXiv 2209.11895) is this:

* position p is written as sines and cosines in dimensions of its own; two heads of layer 0 turn the query by one
  position, so that each token attends to the one before it, and write what that was into other dimensions of their own;
* two heads of layer 1 look for places whose *previous* token is the current one, and copy the token that stands there.

All of it stays trainable.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import OPTForCausalLM

POSITION, TOKEN, PREVIOUS = slice(0, 32), slice(32, 80), slice(80, 128)
"""What the dimensions of the residual stream hold at the start; the model's width is their sum."""
HEADS, HEAD_WIDTH = 2, 32
SHARPNESS = {"previous": 1.3, "match": 2.0}  # of queries and keys: attention is nearly all on one place
WRITE = {"previous": 1 / 8, "match": 0.4}  # undoes the scale of the layer norm before
QUIET = 0.1  # the random rest of the model must not drown the circuit


@torch.no_grad()
def wire(model: OPTForCausalLM, seed: int) -> OPTForCausalLM:
    """Overwrite parts of a freshly made model, in place."""
    generator = torch.Generator().manual_seed(seed)
    decoder = model.model.decoder
    for layer in decoder.layers:
        layer.fc2.weight.mul_(QUIET)
        layer.self_attn.out_proj.weight.mul_(QUIET)
    tokens, positions = decoder.embed_tokens.weight, decoder.embed_positions.weight
    width = TOKEN.stop - TOKEN.start
    tokens.zero_()[:, TOKEN] = torch.randn(len(tokens), width, generator=generator) / math.sqrt(width)
    frequencies = torch.rand((POSITION.stop - POSITION.start) // 2, generator=generator) * math.pi
    angles = torch.arange(len(positions))[:, None] * frequencies
    positions.zero_()[:, POSITION] = torch.cat([angles.sin(), angles.cos()], 1) / math.sqrt(len(frequencies))

    turned = _turned_by_one(frequencies)
    for head in range(HEADS):
        attention = decoder.layers[0].self_attn
        _set(attention, head, "q_proj", POSITION, SHARPNESS["previous"] * turned)
        _set(attention, head, "k_proj", POSITION, SHARPNESS["previous"] * torch.eye(HEAD_WIDTH))
        _move(attention, head, TOKEN, PREVIOUS, WRITE["previous"])
        attention = decoder.layers[1].self_attn
        shared = torch.linalg.qr(torch.randn(width, HEAD_WIDTH, generator=generator))[0].T * SHARPNESS["match"]
        _set(attention, head, "q_proj", TOKEN, shared)
        _set(attention, head, "k_proj", PREVIOUS, shared)
        _move(attention, head, TOKEN, TOKEN, WRITE["match"])
    return model


def _turned_by_one(frequencies: Tensor) -> Tensor:
    """The matrix that takes the sines and cosines of a position to those of the position before."""
    cos, sin = frequencies.cos().diag(), frequencies.sin().diag()
    return torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])


def _set(attention: nn.Module, head: int, name: str, columns: slice, weight: Tensor) -> None:
    """Let a head's projection read these columns only."""
    rows = attention.get_submodule(name).get_parameter("weight")[head * HEAD_WIDTH : (head + 1) * HEAD_WIDTH]
    rows.zero_()[:, columns] = weight


def _move(attention: nn.Module, head: int, source: slice, target: slice, scale: float) -> None:
    """Let a head copy its share of some dimensions into others."""
    share = (source.stop - source.start) // HEADS
    span = slice(head * HEAD_WIDTH, (head + 1) * HEAD_WIDTH)
    value = attention.get_submodule("v_proj").get_parameter("weight")[span].zero_()
    output = attention.get_submodule("out_proj").get_parameter("weight")[:, span].zero_()
    place = torch.arange(share)
    value[place, source.start + head * share + place] = 1.0
    output[target.start + head * share + place, place] = scale
