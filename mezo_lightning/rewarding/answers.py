"""What may be believed of what a reward returns.

A value is a number; None, which is no opinion; or an exception, which says why there is no value for that row. What
reward functions of other projects return beside it is kept as a note on the row: the other entries of
``{"score": 1.0, "acc": 1.0}`` (verl), of ``{"rewards": ..., "extra_logs": {...}}`` (OpenRLHF). Of a tuple only the
reward counts: ``(label, reward)`` of es-at-scale, ``(reward, correct)`` of NeMo-RL, ``(passed, details)`` of verl.

Anything else is a mistake in the reward and raises, whatever is done about failures. NaN and infinity pass as they are:
they come of the data, and whoever asks treats them as failures.
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mezo_lightning.data.batch import Batch

Value = float | None | Exception
"""Of one row: a reward, no opinion, or why it failed."""

Note = float | str
"""What a reward says of a row beside its value, for people to read; numbers are finite."""

_LONGEST_NOTE = 2000  # characters
_REWARD_KEYS = ("rewards", "reward", "score")
_LOGS_KEY = "extra_logs"


@dataclass(frozen=True)
class Answers:
    """What one reward said of N rows."""

    values: list[Value]
    """One a row."""
    notes: dict[str, list[Note | None]] = field(default_factory=dict)
    """What the reward returned beside its values, one note a row; None where a row has none."""


def of_list(reward: str, result: Any, batch: Batch, completions: Sequence[str]) -> Answers:
    """The answers of a reward that is called once for all rows.

    Args:
        reward: Its name, for error messages.
        result: What it returned: a list, tuple, tensor or array with an entry a row, or a mapping that holds one.
        batch: The rows.
        completions: What the model answered to each.

    Raises:
        ValueError: If that is no list of N values.
    """
    _refuse_coroutine(reward, result)
    beside: dict[str, list[Note | None]] = {}
    if isinstance(result, Mapping):
        result, rest = _reward_of_mapping(reward, result, "a list of numbers")
        beside = {name: column for name, value in rest.items() if (column := _column(value, len(batch)))}
    entries = _as_list(result)
    if entries is None:
        shown = result.tolist() if isinstance(result, (Tensor, np.ndarray)) else result
        raise ValueError(f"Reward {reward} returned {short(shown)}, and should return a list of numbers.")
    if len(entries) != len(batch):
        raise ValueError(
            f"Reward {reward} returned {len(entries)} values for {len(batch)} rows: one for each is needed."
        )
    answers = of_entries(reward, entries, batch, completions)
    return Answers(answers.values, beside | answers.notes)


def of_entries(reward: str, entries: Sequence[Any], batch: Batch, completions: Sequence[str]) -> Answers:
    """The answers of a reward that returned one thing for each row.

    Args:
        reward: Its name, for error messages.
        entries: What it returned for each row.
        batch: The rows.
        completions: What the model answered to each.

    Raises:
        ValueError: If one of them is no value.
    """
    values: list[Value] = []
    notes: dict[str, list[Note | None]] = {}
    for row, entry in enumerate(entries):
        _refuse_coroutine(reward, entry)
        value, beside = _entry(reward, entry, describe_row(batch, completions, row))
        values.append(value)
        for name, other in beside.items():
            if (note := as_note(other)) is not None:
                notes.setdefault(name, [None] * len(entries))[row] = note
    return Answers(values, notes)


def single(result: Any) -> Any:
    """The only entry of a list, tensor or array of one, also where a mapping holds it; anything else as it is."""
    if isinstance(result, Mapping):
        return {name: single(value) if name != _LOGS_KEY else _singles(value) for name, value in result.items()}
    entries = _as_list(result) if not isinstance(result, tuple) else None
    return entries[0] if entries is not None and len(entries) == 1 else result


def _singles(value: Any) -> Any:
    return {name: single(each) for name, each in value.items()} if isinstance(value, Mapping) else value


def _entry(reward: str, entry: Any, where: str) -> tuple[Value, dict[str, Any]]:
    """The value of one row, and what stands beside it."""
    if entry is None or isinstance(entry, Exception):
        return entry, {}
    if is_number(entry):
        return as_float(entry), {}
    if isinstance(entry, Mapping):
        value, rest = _reward_of_mapping(reward, entry, f"a number for {where}")
        if value is None or isinstance(value, Exception) or is_number(value):
            return (as_float(value) if is_number(value) else value), rest
    if isinstance(entry, tuple) and (number := _reward_of_tuple(entry)) is not None:
        return number, {}
    raise ValueError(f"Reward {reward} returned {short(entry)} for {where}: a number or None is needed.")


def _reward_of_mapping(reward: str, result: Mapping[Any, Any], wanted: str) -> tuple[Any, dict[str, Any]]:
    keys = [key for key in _REWARD_KEYS if key in result]
    if not keys:
        raise ValueError(
            f"Reward {reward} returned a mapping with the keys {sorted(map(str, result))}, and should return {wanted}, "
            f"or a mapping with the key {' or '.join(_REWARD_KEYS)}."
        )
    logs = result.get(_LOGS_KEY)
    rest = {str(name): value for name, value in result.items() if name not in (keys[0], _LOGS_KEY)}
    return result[keys[0]], rest | (dict(logs) if isinstance(logs, Mapping) else {})


def _reward_of_tuple(entry: tuple[Any, ...]) -> float | None:
    """Of (label, reward) the second, else the first where nothing behind it could be meant."""
    if len(entry) == 2 and isinstance(entry[0], str) and is_number(entry[1]):
        return as_float(entry[1])
    if len(entry) > 1 and is_number(entry[0]) and not any(is_number(e) and not _is_bool(e) for e in entry[1:]):
        return as_float(entry[0])
    return None


def _as_list(value: Any) -> list[Any] | None:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist() if value.ndim > 0 else None
    return list(value) if isinstance(value, (list, tuple)) else None


def _column(value: Any, length: int) -> list[Note | None]:
    """A note on each row; empty where these are none."""
    entries = _as_list(value)
    return [] if entries is None or len(entries) != length else [as_note(entry) for entry in entries]


def _refuse_coroutine(reward: str, result: Any) -> None:
    if inspect.iscoroutine(result):
        result.close()
        raise ValueError(
            f"Reward {reward} is async, and nothing about it says so: write it with async def, or as an object whose "
            "__call__ is."
        )


def is_number(value: Any) -> bool:
    """Whether this is one number: Python's, NumPy's, or a tensor without dimensions."""
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim == 0
    return isinstance(value, (numbers.Real, np.bool_))


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def as_float(value: Any) -> float:
    """A number as float; infinite where it is too large for one."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_note(value: Any) -> Note | None:
    """What is kept of something said beside a value: a finite number or a text, cut if it is long; None for nothing."""
    if value is None:
        return None
    if is_number(value):
        number = as_float(value)
        return number if math.isfinite(number) else None
    return str(value)[:_LONGEST_NOTE] or None


def describe_row(batch: Batch, completions: Sequence[str], row: int) -> str:
    """A row, for error messages: its number in the data and the text of it, shortened."""
    return f"row {batch.index[row]} (prompt {short(batch.prompts[row])}, completion {short(completions[row])})"


def short(value: Any, length: int = 80) -> str:
    """The repr of a value, without its middle where it is long: the end of a prompt says more than its beginning."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 4]}...{text[-3 * length // 4 :]}"
