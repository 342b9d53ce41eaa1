"""What there is to say about asking rewards: how often, how long it took, what failed, and what they said beside."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mezo_lightning.rewarding.answers import Note, as_float, as_note, is_number, short
from mezo_lightning.rewarding.calls import Listener

log = logging.getLogger(__name__)

_COUNTED_AT = frozenset(10**exponent for exponent in range(1, 10))


@dataclass
class Tally:
    """Counts since they were last taken; of one process, or of several added up."""

    asked: int = 0
    """Rows that a reward was called for, in all calls."""
    remembered: int = 0
    """Rows that could have been asked about, and whose answer was known, or asked for in the same call already."""
    failed: int = 0
    """Rows asked about without getting an answer."""
    seconds: list[float] = field(default_factory=list)
    """Of each call."""
    said: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """What rewards had to say beside their values, by name."""

    def add(self, other: Tally) -> None:
        """Count what another process counted."""
        self.asked += other.asked
        self.remembered += other.remembered
        self.failed += other.failed
        self.seconds += other.seconds
        for name, values in other.said.items():
            self.said[name] += values

    def say(self, reward: str, name: str, values: Iterable[Any]) -> None:
        """Take note of figures that a reward gives; what is no finite number is left out."""
        numbers = [as_float(value) for value in values if is_number(value)]
        known = [value for value in numbers if math.isfinite(value)]
        if known:
            self.said[f"rewards/{reward}/{name}"] += known

    def calls(self) -> dict[str, float]:
        """How asking went; nothing where nobody was to be asked."""
        if not (self.asked or self.remembered):
            return {}
        figures = {"asked": float(self.asked), "failed": float(self.failed)}
        figures["hit_rate"] = self.remembered / (self.asked + self.remembered)
        if self.seconds:
            median, slowest = np.percentile(self.seconds, [50, 95]).tolist()
            figures |= {"seconds_p50": median, "seconds_p95": slowest}
        return figures

    def statements(self) -> dict[str, float]:
        """What rewards said, as means."""
        return {name: math.fsum(values) / len(values) for name, values in sorted(self.said.items())}


def listeners(reward: str, tally: Tally, notes: Sequence[dict[str, Note]]) -> dict[str, Listener]:
    """``log_metric(name, value)`` and ``log_extra(column, values)``, as TRL gives them to rewards, for one call.

    Args:
        reward: The name of the reward.
        tally: Takes note of figures.
        notes: Of each completion that the call is about; what is said of it is put there.
    """

    def log_metric(name: str, value: Any) -> None:
        tally.say(reward, name, [value])

    def log_extra(column: str, values: Sequence[Any]) -> None:
        if isinstance(values, str) or len(values) != len(notes):
            raise ValueError(
                f"log_extra({column!r}, ...) takes a list with an entry for each of {len(notes)} completions, and got "
                f"{short(values)}"
            )
        tally.say(reward, column, values)
        for taken, value in zip(notes, values, strict=True):
            if (note := as_note(value)) is not None:
                taken[str(column)] = note

    return {"log_metric": Listener(log_metric), "log_extra": Listener(log_extra)}


class FailureLog:
    """Says of each kind of failure what it is when it first happens, and later how often it has happened.

    Args:
        reward: The name of the reward.
    """

    def __init__(self, reward: str):
        self._reward = reward
        self._counts: Counter[str] = Counter()

    def note(self, error: Exception, where: str) -> None:
        """Take note of a failure that is masked.

        Args:
            error: What happened.
            where: Of which row, in words.
        """
        kind = type(error).__name__
        self._counts[kind] += 1
        count = self._counts[kind]
        if count == 1:
            log.warning(
                "Reward %s failed for %s: %s. Such samples are left out; further failures of this kind are counted.",
                *(self._reward, where, described(error)),
            )
        elif count in _COUNTED_AT:
            log.warning("Reward %s: %d failures of the kind %s so far.", self._reward, count, kind)


def described(error: BaseException) -> str:
    """An exception in a line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
