"""Directions: z as a pure function of (seed, position), with the same bits on every device and execution path.

A counter hash gives a 64-bit word for every four positions of the flat parameter vector; each 16-bit lane of the word
becomes one element of z::

    word(seed, b)  = mix64(key(seed) + b * increment(seed))        b = position // 4, wrapping int64 arithmetic
    lane(position) = bits [16 * (position % 4), +16) of the word
    Gaussian       = QUANTILES[lane]                               Rademacher = +1 or -1 by the lane's top bit

``mix64`` is the finaliser of SplitMix64 (Steele, Lea & Flood, 2014). Each seed has a key and an odd increment of its
own, so that no direction is a shifted copy of another. Published zeroth-order code draws z from torch's global
generator instead, which makes it depend on the order, shape, dtype and device of the parameters, and on how they are
sharded.

All of it is integer arithmetic and table look-up in plain torch: no compiler is needed, and compiling changes no bit.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo, Slice

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, SplitMix64's increment
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SIGNIFICANT_BITS = 12  # of z and of every coefficient: their product is then exact in fp32
_MASK64 = (1 << 64) - 1
_QUANTILES_SHA256 = "1afcccbe0499442bf20fd94d3cb5dd5758a44713173548bccb989c6ef184d1fa"

assert sys.byteorder == "little", "lanes are read through a little-endian view of the words"


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as ``value``."""
    return ((value + (1 << 63)) & _MASK64) - (1 << 63)


def _mix64_int(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * MULTIPLIERS[0]) & _MASK64
    value = ((value ^ (value >> 27)) * MULTIPLIERS[1]) & _MASK64
    return value ^ (value >> 31)


def derive_seed(seed: int, *path: int) -> int:
    """A seed for a purpose: a pure function of a base seed and a path such as (step, query).

    Args:
        seed: The base seed, any integer.
        path: Integers that name the purpose; different paths give unrelated seeds.

    Returns:
        An unsigned 64-bit integer.
    """
    state = _mix64_int(seed + GOLDEN)
    for part in path:
        # The multiplication tells the state from the part: (1, 2) and (2, 1) must not meet.
        state = _mix64_int(state * MULTIPLIERS[0] + _mix64_int(part + GOLDEN))
    return state


def mix64(x: Tensor, temp: Tensor | None = None) -> Tensor:
    """SplitMix64's finaliser, in place, on an int64 tensor taken as unsigned words.

    Args:
        x: int64, any shape; overwritten.
        temp: int64 of the same shape, to save an allocation.
    """
    temp = torch.empty_like(x) if temp is None else temp
    for shift, multiplier in ((30, MULTIPLIERS[0]), (27, MULTIPLIERS[1]), (31, None)):
        # torch's right shift is arithmetic: the mask drops the copies of the sign bit.
        torch.bitwise_right_shift(x, shift, out=temp)
        temp.bitwise_and_((1 << (64 - shift)) - 1)
        x.bitwise_xor_(temp)
        if multiplier is not None:
            x.mul_(_signed(multiplier))
    return x


@lru_cache(maxsize=4096)
def _stream(seed: int) -> tuple[int, int]:
    """The key and the odd increment of a seed's counter sequence."""
    key = derive_seed(seed, 0)
    increment = derive_seed(seed, 1) | 1
    # Increments with few bit changes make weak sequences (Steele, Lea & Flood, section 5).
    if (increment ^ (increment >> 1)).bit_count() < 24:
        increment ^= 0xAAAAAAAAAAAAAAAA
    return key, increment


def chunk_numel(device: torch.device) -> int:
    """Elements to process at once: small enough for a core's cache, large enough for a GPU's launch cost."""
    # 768 x 768, the most common matrix of small models, is one chunk.
    return 10 << 16 if device.type == "cpu" else 1 << 22


class _Workspace:
    """Buffers for one chunk, reused by every call on this thread and device."""

    def __init__(self, device: torch.device):
        words = chunk_numel(device) // 4 + 2
        self.counters = torch.arange(words, dtype=torch.int64, device=device)
        self.words = torch.empty(words, dtype=torch.int64, device=device)
        self.temp = torch.empty(words, dtype=torch.int64, device=device)
        self.lanes = torch.empty(chunk_numel(device), dtype=torch.int32, device=device)
        self._offsets = torch.empty_like(self.counters)
        self._multiplied: tuple[int, int] = (0, 0)

    def offsets(self, increment: int, count: int) -> Tensor:
        """The first so many counters times increment, which all chunks of a direction share."""
        known, multiplied = self._multiplied
        begin = multiplied if known == increment else 0
        if begin < count:
            self._multiplied = (0, 0)  # an interrupt in between must not leave one with the other's name
            torch.mul(self.counters[begin:count], _signed(increment), out=self._offsets[begin:count])
            self._multiplied = (increment, count)
        return self._offsets[:count]


class _Workspaces(threading.local):
    def __init__(self) -> None:
        self.by_device: dict[torch.device, _Workspace] = {}

    def __getitem__(self, device: torch.device) -> _Workspace:
        if device not in self.by_device:
            # An inference tensor could not be written outside of inference mode later on.
            with torch.inference_mode(False):
                self.by_device[device] = _Workspace(device)
        return self.by_device[device]


_workspaces = _Workspaces()


def fill_lanes(out: Tensor, seed: int, start: int) -> Tensor:
    """Write the 16-bit lanes of positions ``start`` to ``start + out.numel()``.

    Args:
        out: int32 [n], at most one chunk; receives values in [0, 65536).
        seed: The direction's seed.
        start: The first position in the flat vector of the unsharded model.
    """
    workspace = _workspaces[out.device]
    key, increment = _stream(seed)
    block, skip = divmod(start, 4)
    count = (skip + out.numel() + 3) // 4
    words = workspace.words[:count]
    torch.add(workspace.offsets(increment, count), _signed(key + block * increment), out=words)
    mix64(words, workspace.temp[:count])
    return out.copy_(words.view(torch.uint16)[skip : skip + out.numel()])


def lanes_of_rows(seed: int, starts: Tensor, width: int) -> Tensor:
    """The lanes of several rows of positions at once, as int32 [rows, width].

    Args:
        seed: The direction's seed.
        starts: int64 [rows], the position of each row's first element.
        width: Elements in a row.
    """
    key, increment = _stream(seed)
    skip = starts.remainder(4)
    blocks = torch.arange((width + 6) // 4, dtype=torch.int64, device=starts.device)
    words = (starts.div(4, rounding_mode="floor")[:, None] + blocks).mul_(_signed(increment)).add_(_signed(key))
    lanes = mix64(words).view(torch.uint16).to(torch.int32)
    columns = skip[:, None] + torch.arange(width, dtype=torch.int64, device=starts.device)
    return lanes.gather(1, columns)


class Directions(ABC):
    """A sampler at work on one parameter table: z as a function of seed, position and the number of the step."""

    @abstractmethod
    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        """Write z[start : start + n] into ``out`` (fp32 [n], contiguous) and return it.

        Args:
            out: Receives the elements.
            seed: The direction's seed.
            start: The first position in the flat vector of the unsharded model.
            number: How many steps the run has made; for directions that have something in common over several steps.
        """

    @abstractmethod
    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        """Z at several rows of one matrix: fp32 [rows, width] for int64 ``starts`` [rows]."""

    def active(self, info: ParameterInfo, weights: Tensor) -> Tensor | None:
        """Which weights move at all; at the others a direction is 0, in the place of what ``fill`` and ``rows`` give.

        Args:
            info: A parameter.
            weights: Some of its weights, as they are when the step begins, in any shape.

        Returns:
            fp32 in the shape of ``weights``: 1 where one moves, else 0; None where all do, whatever they are.
        """
        del info, weights
        return None


class Sampler(ABC):
    """A distribution of directions, with mean 0 in every coordinate that is tuned.

    The variance is 1, but for samplers that say otherwise: s^2 with ``Scaled``, and 0 where ``Sparse`` and ``Subset``
    leave a coordinate out.
    """

    @property
    def same_at_every_step(self) -> bool:
        """Whether a seed is sure to give the same direction at every step.

        Rules such as ``Momentum``, which make the directions of earlier steps again from their seeds, need that.
        """
        return False

    @property
    def unit_variance(self) -> bool:
        """Whether every coordinate has variance 1 at every step, so that coefficients tell how far a step goes."""
        return True

    @property
    def nearly_orthogonal(self) -> bool:
        """Whether directions of different seeds are nearly orthogonal, given many elements.

        They are not where they have a factor in common.
        """
        return True

    @property
    def looks_at_weights(self) -> bool:
        """Whether weights decide on where directions are 0; other samplers cannot be made of such a one."""
        return False

    @property
    def inner(self) -> Sampler | None:
        """The sampler that this one is made of, if it is made of one."""
        return None

    def seeded(self, seed: int) -> Sampler:
        """This sampler with a seed wherever it draws something of its own and was given none.

        Args:
            seed: The seed.
        """
        del seed
        return self

    def settled(self, slices: Sequence[Slice], table: Sequence[ParameterInfo]) -> Sampler:
        """This sampler with all that it has to know of the weights that a run begins with; most need to know nothing.

        Args:
            slices: What this process holds of each parameter, maybe nothing.
            table: Every parameter of the unsharded model, in the order of positions.
        """
        del slices, table
        return self

    @abstractmethod
    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        """Set to work on a parameter table."""


def check_inner(outer: str, sampler: Sampler, advice: str | None = None) -> None:
    """Refuse a sampler that another one cannot be made of.

    Args:
        outer: The name of the other one.
        sampler: What it is to be made of.
        advice: What to do instead; None: make it of the other one.

    Raises:
        ValueError: If weights decide on where its directions are 0, which the other one would not know.
    """
    if sampler.looks_at_weights:
        inner = type(sampler).__name__
        raise ValueError(
            f"{outer}(sampler={inner}) does not know the weights, which decide on where {inner} is 0: "
            + (advice or f"put it the other way round, {inner}(sampler={outer})")
        )


class LaneSampler(Sampler, Directions):
    """A sampler that turns each 16-bit lane into one element; neither table nor step have a say."""

    @property
    def same_at_every_step(self) -> bool:
        return True

    def bind(self, table: Sequence[ParameterInfo]) -> Directions:
        return self

    @abstractmethod
    def from_lanes(self, lanes: Tensor, out: Tensor) -> Tensor:
        """Write the elements for ``lanes`` (int32 [n]) into ``out`` (fp32 [n])."""

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        assert (out.dtype, out.dim()) == (torch.float32, 1), (out.dtype, out.shape)
        chunk = chunk_numel(out.device)
        for begin in range(0, out.numel(), chunk):
            part = out[begin : begin + chunk]
            lanes = _workspaces[out.device].lanes[: part.numel()]
            self.from_lanes(fill_lanes(lanes, seed, start + begin), part)
        return out

    def rows(self, seed: int, starts: Tensor, width: int, number: int = 0) -> Tensor:
        lanes = lanes_of_rows(seed, starts, width)
        out = torch.empty(lanes.numel(), dtype=torch.float32, device=lanes.device)
        return self.from_lanes(lanes.view(-1), out).view(lanes.shape)


@dataclass(frozen=True)
class Gaussian(LaneSampler):
    """Standard normal directions, by a table of 65,536 symmetric quantiles with 12 significant bits each.

    Mean exactly 0, variance 1 to within 1e-6, kurtosis 2.999, largest element 4.32.
    """

    def from_lanes(self, lanes: Tensor, out: Tensor) -> Tensor:
        return torch.index_select(_quantiles(lanes.device), 0, lanes, out=out)


@dataclass(frozen=True)
class Rademacher(LaneSampler):
    """Directions of +1 and -1 with equal probability; no table, and exact in every dtype."""

    def from_lanes(self, lanes: Tensor, out: Tensor) -> Tensor:
        return torch.ge(lanes, 1 << 15, out=out).mul_(-2.0).add_(1.0)


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """The normal quantiles at (k + 1/2) / 65536, scaled to variance 1, then rounded to 12 significant bits."""
    if device.type != "cpu":
        return _quantiles(torch.device("cpu")).to(device)
    with torch.inference_mode(False):
        upper = [NormalDist().inv_cdf((k + 0.5) / 65536) for k in range(32768, 65536)]
        half = torch.tensor(upper, dtype=torch.float64, device=device)
        half /= half.square().mean().sqrt()
        mantissa, exponent = torch.frexp(half)
        half = torch.ldexp((mantissa * 2**SIGNIFICANT_BITS).round(), exponent - SIGNIFICANT_BITS).to(torch.float32)
        table = torch.cat([-half.flip(0), half])
    digest = hashlib.sha256(ctypes.string_at(table.data_ptr(), table.nbytes)).hexdigest()
    if digest != _QUANTILES_SHA256:
        raise RuntimeError(
            f"the table of normal quantiles came out as {digest}, not {_QUANTILES_SHA256}: directions would differ "
            "from those of other machines; please report this with your versions of Python and torch"
        )
    return table
