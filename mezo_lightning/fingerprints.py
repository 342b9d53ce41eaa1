"""A fingerprint of weights, so that a log is refused on others than it began with: the tuned ones, and the frozen ones.

An element of the flattened weight ``name``, its bits taken for an integer n, counts ::

    n * odd(j) * odd(name, i) + odd(name)      at place 2^18 * i + j, modulo 2^64

where the odd numbers are fixed and look random. The fingerprint is the sum over all elements: whatever way weights are
cut up, those of the pieces add up to it. It is a multilinear hash (Lemire & Kaser, 2014, arXiv 1202.4961): a single bit
that changes is always seen, and two models that differ in more than that agree with a chance of about 2^-32 at most.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn

from mezo_lightning.samplers import GOLDEN, derive_seed, mix64
from mezo_lightning.shards import Shard

_BLOCK = 1 << 18
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, those that are tied once, under the names of ``named_parameters``.

    Buffers that a checkpoint does not hold follow from the model's configuration. The scales that bitsandbytes keeps
    beside its codes are neither parameters nor buffers, and left out: on some CPUs it rounds those of 4-bit layers when
    it first computes, and ``state_dict`` would bring them into a wrong order.
    """
    derived = {id(module._buffers[name]) for module in model.modules() for name in module._non_persistent_buffers_set}
    buffers = {name: buffer for name, buffer in model.named_buffers() if id(buffer) not in derived}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def fingerprint_of(named: Iterable[tuple[str, Tensor]], without: Container[str] = ()) -> int:
    """A 64-bit hash of weights by name, 0 if there are none; the fingerprints of shards add up, modulo 2^64.

    Args:
        named: Weights of any dtype by name, ``Shard``s among them, looked at one after another.
        without: Names of those that do not count, such as the tuned ones.
    """
    return sum(_fingerprint(name, weights) for name, weights in named if name not in without) % (1 << 64)


def _fingerprint(name: str, weights: Tensor) -> int:
    size = weights.element_size()
    # Elements of 8 bytes are taken for two of 4: the product would lose all but the lowest bit of what is at their top.
    integers = weights.detach().reshape(-1).view(_INTEGERS[min(size, 4)])
    begin = (weights.begin if isinstance(weights, Shard) else 0) * max(1, size // 4)
    end = begin + integers.numel()
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    total = integers.numel() * (key | 1)
    products = torch.empty(min(integers.numel(), _BLOCK), dtype=torch.int64, device=integers.device)
    for block in range(begin // _BLOCK, -(-end // _BLOCK)):
        start = block * _BLOCK
        low, high = max(begin, start), min(end, start + _BLOCK)
        part = products[: high - low].copy_(integers[low - begin : high - begin])
        part.mul_(_factors(part.device)[low - start : high - start])
        total += int(part.sum()) * (derive_seed(key, block) | 1)
    return total


@lru_cache(maxsize=8)
def _factors(device: torch.device) -> Tensor:
    """The odd factors of the places within a block, as int64."""
    with torch.inference_mode(False):
        counters = torch.arange(1, _BLOCK + 1, dtype=torch.int64, device=device)
        return mix64(counters.mul_(GOLDEN - 2**64)).bitwise_or_(1)
