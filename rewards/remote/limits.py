"""How hard and how often a service may be asked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter


@dataclass(frozen=True)
class Limits:
    """Time-outs, repetitions and rates. They hold for each process that asks; in a run that is rank zero alone."""

    timeout: float = 60.0
    """Seconds that one request may take from connecting to the last byte; then it is repeated."""

    attempts: int = 6
    """How often a request is made at most, the first time included, before its rows count as failed."""

    first_wait: float = 0.5
    """Longest pause in seconds before the first repetition. It doubles from one to the next; how much of it is waited
    is drawn at random. A Retry-After of the service comes on top."""

    longest_wait: float = 60.0
    """Longest such pause in seconds; rows of a service that asks for a longer one count as failed at once."""

    concurrency: int = 32
    """How many requests may be under way at once."""

    requests_per_minute: int | None = None
    """Never more requests than this within a minute; a tenth of them may come at once."""

    tokens_per_minute: int | None = None
    """The same for tokens, taken as a fourth of the request's characters and the longest reply asked for."""

    rest: float = 15.0
    """Seconds for which an endpoint that fails is left alone, where there are others."""

    def __post_init__(self) -> None:
        for name in ("timeout", "first_wait", "longest_wait", "rest"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"Limits({name}={value}) must be a positive number of seconds.")
        for name in ("attempts", "concurrency", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Limits({name}={value}) must be at least 1.")


class Pace:
    """Lets a number of units through in a minute, not one more in any minute; None lets everything through."""

    def __init__(self, per_minute: int | None) -> None:
        from aiolimiter import AsyncLimiter

        self._limiter: AsyncLimiter | None = None
        if per_minute is not None:
            # A leaky bucket lets its whole capacity through at once and goes on at its rate: both together are what
            # may come within one minute.
            capacity = max(1, per_minute // 10)
            rate = (per_minute - capacity + 1) / 60
            self._limiter = AsyncLimiter(capacity, capacity / rate)

    async def wait(self, amount: float) -> None:
        """Returns when `amount` units may pass."""
        while self._limiter is not None and amount > 0:
            part = min(amount, self._limiter.max_rate)
            await self._limiter.acquire(part)
            amount -= part
