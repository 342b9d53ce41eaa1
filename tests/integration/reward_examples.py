"""Rewards for runs in tests, found by import path."""

from collections.abc import Sequence
from typing import Any

calls = 0
"""Of `flaky`."""


def letters(completions: Sequence[str], **_: Any) -> list[float]:
    """Moves with every character."""
    return [sum(map(ord, text)) % 1000 / 1000 for text in completions]


def constant(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.5] * len(completions)


def flaky(completions: Sequence[str], **_: Any) -> list[float]:
    """Raises at every 7th call, and has NaNs at every 3rd: failures on one side of a pair only."""
    global calls
    calls += 1
    if calls % 7 == 0:
        raise ConnectionError("the judge is down")
    values = letters(completions)
    if calls % 3 == 0:
        values[calls % len(values)] = float("nan")
    return values


def failing_later(completions: Sequence[str], **_: Any) -> list[float]:
    """Fails at its 6th call."""
    global calls
    calls += 1
    if calls == 6:
        raise ConnectionError("the judge is down")
    return letters(completions)


def no_opinion(completions: Sequence[str], **_: Any) -> list[None]:
    return [None] * len(completions)


def too_short(completions: Sequence[str], **_: Any) -> list[float]:
    return [0.0] * (len(completions) - 1)


def nan(completions: Sequence[str], **_: Any) -> list[float]:
    return [float("nan")] * len(completions)


def text(completions: Sequence[str], **_: Any) -> list[str]:
    return ["good"] * len(completions)


def needs_gold(completions: Sequence[str], gold: Sequence[str]) -> list[float]:
    return [float(a == b) for a, b in zip(completions, gold, strict=True)]


def paid(completions: Sequence[str], **_: Any) -> list[float]:
    """Counts what it costs."""
    global calls
    calls += 1
    return letters(completions)


def default_dtype(completions: Sequence[str], **_: Any) -> list[float]:
    """What a reward that makes tensors of its own would lose in 16 bits."""
    import torch

    return torch.tensor([0.123456789] * len(completions)).tolist()
