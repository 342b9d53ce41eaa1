"""What a reward function can be told: the rows of a call, and where each argument gets its values from.

The names here are those of ``conventions.py``; this file knows no convention.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mezo_lightning.data.batch import Batch

TRL_EXTRAS = ("trainer_state", "log_extra", "log_metric")
"""What TRL gives to every reward function with a ``**kwargs``."""

OFFERED = frozenset({*TRL_EXTRAS, "finish_reasons", "step", "run"})
"""What is offered to any reward that names it, beside what its convention gives."""


@dataclass(frozen=True)
class Rows:
    """What a call is about: N rows, and what the model answered to them."""

    batch: Batch
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]] | None = None
    """The completions as tokens, where there are any."""
    finish_reasons: Sequence[str] | None = None
    """``stop`` or ``length`` for each completion."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are the same for all rows, such as ``trainer_state`` and ``log_metric``."""
    conversational: bool = False
    """Show prompts and completions as lists of one message, ``{"role", "content"}``, as TRL and verifiers do."""

    def __len__(self) -> int:
        return len(self.batch)

    def select(self, places: Iterable[int]) -> Rows:
        """The rows at these places, in this order."""
        chosen = list(places)

        def take(values: Sequence[Any] | None) -> Any:
            return None if values is None else [values[place] for place in chosen]

        return dataclasses.replace(
            self,
            batch=self.batch.select(chosen),
            completions=take(self.completions),
            completion_ids=take(self.completion_ids),
            finish_reasons=take(self.finish_reasons),
        )


@dataclass(frozen=True)
class Parameters:
    """The names that a reward function takes, and where each gets its value from."""

    sources: Mapping[str, str]
    """For each parameter the name of what it is given: its own, unless a column map says another."""
    required: frozenset[str]
    """Parameters that have no default."""
    takes_all: bool = False
    """Whether there is a ``**kwargs``."""

    @property
    def wanted(self) -> frozenset[str]:
        """The names of what the parameters are given."""
        return frozenset(self.sources.values())

    @property
    def needed(self) -> list[str]:
        """The names of what the required parameters are given, in their order."""
        return [source for parameter, source in self.sources.items() if parameter in self.required]

    def without(self, names: Collection[str]) -> Parameters:
        """What is left when some parameters have their values already."""
        left = {parameter: source for parameter, source in self.sources.items() if parameter not in names}
        return dataclasses.replace(self, sources=left)

    def pick(self, offered: Mapping[str, Any], spare: Collection[str]) -> dict[str, Any]:
        """The keyword arguments of a call.

        Args:
            offered: All that there is.
            spare: What of it a ``**kwargs`` is given too.
        """
        told = {parameter: offered[source] for parameter, source in self.sources.items() if source in offered}
        if self.takes_all:
            told |= {name: offered[name] for name in spare if name in offered and name not in told}
        return told


# -- where the values of an argument come from -------------------------------------------------------------------------


class Source(ABC):
    """An argument of a convention."""

    @property
    @abstractmethod
    def about(self) -> str:
        """What it is, in words."""

    @abstractmethod
    def available(self, columns: Collection[str]) -> bool:
        """Whether data with these columns has a value for it."""

    @abstractmethod
    def __call__(self, rows: Rows) -> list[Any] | None:
        """One value a row; None where there are none."""


@dataclass(frozen=True)
class FromRows(Source):
    """What the model was given and what it answered."""

    read: Callable[[Rows], Sequence[Any] | None]
    name: str

    @property
    def about(self) -> str:
        return self.name

    def available(self, columns: Collection[str]) -> bool:
        return True

    def __call__(self, rows: Rows) -> list[Any] | None:
        values = self.read(rows)
        return None if values is None else list(values)


@dataclass(frozen=True)
class FromColumn(Source):
    """The first of some columns that the data has; else what ``default`` makes, where it has one."""

    names: tuple[str, ...]
    default: Callable[[], Any] | None = None

    @property
    def about(self) -> str:
        default = "" if self.default is None else f", else {self.default()!r}"
        return f"column {' or '.join(self.names)}{default}"

    def available(self, columns: Collection[str]) -> bool:
        return self.default is not None or any(name in columns for name in self.names)

    def __call__(self, rows: Rows) -> list[Any] | None:
        for name in self.names:
            if name in rows.batch.columns:
                return list(rows.batch.columns[name])
        return None if self.default is None else [self.default() for _ in range(len(rows))]


class FromGroundTruth(Source):
    """The column ``ground_truth``, or as in verl's data the entry of that name in the column ``reward_model``."""

    @property
    def about(self) -> str:
        return "column ground_truth, or reward_model.ground_truth"

    def available(self, columns: Collection[str]) -> bool:
        return "ground_truth" in columns or "reward_model" in columns

    def __call__(self, rows: Rows) -> list[Any] | None:
        columns = rows.batch.columns
        if "ground_truth" in columns:
            return list(columns["ground_truth"])
        if "reward_model" not in columns:
            return None
        for index, entry in zip(rows.batch.index, columns["reward_model"], strict=True):
            if not (isinstance(entry, Mapping) and "ground_truth" in entry):
                raise ValueError(f"row {index}: the column reward_model holds no ground_truth: {entry!r}.")
        return [entry["ground_truth"] for entry in columns["reward_model"]]


def prompts(rows: Rows) -> Sequence[Any]:
    """The prompts, as messages where the rows are conversational."""
    if not rows.conversational:
        return rows.batch.prompts
    return [[{"role": "user", "content": prompt}] for prompt in rows.batch.prompts]


def completions(rows: Rows) -> Sequence[Any]:
    """The completions, as messages where the rows are conversational."""
    if not rows.conversational:
        return rows.completions
    return [[{"role": "assistant", "content": text}] for text in rows.completions]


def queries(rows: Rows) -> Sequence[str]:
    """Prompt and completion as one text."""
    return [prompt + text for prompt, text in zip(rows.batch.prompts, rows.completions, strict=True)]


def ids(rows: Rows) -> Sequence[Any] | None:
    """The completions as token ids."""
    return None if rows.completion_ids is None else [list(row) for row in rows.completion_ids]
