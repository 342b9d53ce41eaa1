"""One reward function: which names it takes, and what may be believed of what it returns.

The convention is TRL's: ``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``, one value a
row, higher is better, None for "no opinion". Unlike TRL, a function is told only the names it accepts, so that a
required name which no column has is found before any work.
"""

import functools
import importlib
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from mezo_lightning.batch import Batch

RewardFunction = Callable[..., Any]
"""`reward(prompts, completions, completion_ids, **columns) -> list[float | None]`: a function or a callable object."""

_OURS = ("prompts", "completions", "completion_ids")


@runtime_checkable
class NamesColumns(Protocol):
    """A reward that takes **columns and says which of them it cannot do without."""

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Names of data set columns."""
        ...


class CallFailed(Exception):
    """A reward raised; its cause is the reward's own exception."""


class NamedReward:
    """One reward function, its name and what it wants to be told."""

    def __init__(self, name: str, function: RewardFunction) -> None:
        if not callable(function):
            raise ValueError(f"reward holds {_short(function)}, which is neither a function nor an import path.")
        self.name, self.function = name, function
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise ValueError(
                f"Reward {name} is async, which is not supported: wrap it in a function that waits for it."
            )
        if isinstance(function, type):
            raise ValueError(f"Reward {name} is a class: give an instance, in YAML with class_path and init_args.")
        try:
            parameters = inspect.signature(function).parameters.values()
        except ValueError as error:
            raise ValueError(f"Reward {name} does not tell its parameters: wrap it in a Python function.") from error
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
            raise ValueError(f"Reward {name} takes positional-only arguments, and is called with names.")
        self.accepts = {p.name for p in by_name}
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self.requires = {p.name for p in by_name if p.default is p.empty}
        if isinstance(function, NamesColumns):
            self.requires |= set(function.required_columns)

    def check(self, columns: Collection[str]) -> None:
        """Raises ValueError where a required column is missing, or a column has the name of an argument."""
        for name in sorted(self.requires.difference(_OURS, columns)):
            available = ", ".join(columns) or "none"
            raise ValueError(f"Reward {self.name} needs the column {name!r}; the data has: {available}.")
        for name in sorted((self.accepts if not self.takes_all else set(columns)).intersection(_OURS, columns)):
            raise ValueError(f"The data's column {name!r} has the name of an argument of rewards: rename the column.")

    def ask(
        self, batch: Batch, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None
    ) -> list[float | None]:
        """Calls the function; raises CallFailed for its exceptions, ValueError for what is no list of N numbers."""
        arguments: dict[str, Any] = {name: list(values) for name, values in batch.columns.items()}
        arguments |= {"prompts": list(batch.prompts), "completions": list(completions)}
        if completion_ids is not None:
            arguments["completion_ids"] = [list(ids) for ids in completion_ids]
        if not self.takes_all:
            arguments = {name: value for name, value in arguments.items() if name in self.accepts}
        if missing := self.requires - arguments.keys():
            raise ValueError(f"Reward {self.name} needs {sorted(missing)}, which this batch does not have.")
        try:
            result = self.function(**arguments)
        except Exception as error:
            first = describe_row(batch, completions, 0)
            raise CallFailed(
                f"Reward {self.name} raised {type(error).__name__}: {error} (in a call for {len(batch)} rows, "
                f"the first of them {first})."
            ) from error
        return self._numbers(result, batch, completions)

    def _numbers(self, result: Any, batch: Batch, completions: Sequence[str]) -> list[float | None]:
        if inspect.iscoroutine(result):
            result.close()
            raise ValueError(f"Reward {self.name} is async, which is not supported: wrap it in a function that waits.")
        if isinstance(result, (Tensor, np.ndarray)):
            result = result.tolist()
        if not isinstance(result, (list, tuple)):
            raise ValueError(f"Reward {self.name} returned {_short(result)}, and should return a list of numbers.")
        if len(result) != len(batch):
            raise ValueError(
                f"Reward {self.name} returned {len(result)} values for {len(batch)} rows: one for each is needed."
            )
        for row, value in enumerate(result):
            if not _is_number(value) and value is not None:
                raise ValueError(
                    f"Reward {self.name} returned {_short(value)} for {describe_row(batch, completions, row)}: "
                    "a number or None is needed."
                )
        return [None if value is None else _as_float(value) for value in result]


def _is_number(value: Any) -> bool:
    return isinstance(value, (numbers.Real, np.bool_)) or (isinstance(value, Tensor) and value.ndim == 0)


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def imported(path: str) -> RewardFunction:
    """The callable at an import path."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        raise ValueError(f"reward={path!r}: {error}. Is it installed, or its folder on PYTHONPATH?") from error
    except (ValueError, AttributeError) as error:
        raise ValueError(f"reward={path!r}: write the import path of a function, such as rewards.squad.f1.") from error
    if not callable(found):
        raise ValueError(f"reward={path!r} is {_short(found)}, which cannot be called.")
    return found


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The names of the functions, or of the objects' classes; f1, f1_2, f1_3 where one repeats."""
    names = [_name(function) for function in functions]
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{before + 1}" if before else name for name, before in zip(names, earlier, strict=True)]


def _name(function: RewardFunction) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return function.__name__
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return name.strip("<>")


def describe_row(batch: Batch, completions: Sequence[str], row: int) -> str:
    """A row, for error messages: its number in the data and the text of it, shortened."""
    return f"row {batch.index[row]} (prompt {_short(batch.prompts[row])}, completion {_short(completions[row])})"


def _short(value: Any, length: int = 80) -> str:
    # The end of a prompt says more than its beginning.
    text = repr(value)
    return text if len(text) <= length else f"{text[: length // 4]}...{text[-3 * length // 4 :]}"
