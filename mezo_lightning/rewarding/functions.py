"""One reward function: where it comes from, how it is called, and what it says about itself.

Any convention will do (``recognition.py``). A function is told only the names it accepts, so that a required name which
no column has is found before any work.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mezo_lightning.rewarding.answers import Answers, describe_row, short
from mezo_lightning.rewarding.arguments import OFFERED, Parameters, Rows
from mezo_lightning.rewarding.conventions import Convention, listed
from mezo_lightning.rewarding.identity import identity_of
from mezo_lightning.rewarding.importing import importable, imported, path_of
from mezo_lightning.rewarding.recognition import makes_rewards, multi_turn, recognise
from mezo_lightning.rewarding.settings import Reward

__all__ = ["NamedReward", "NamesColumns", "RewardFunction", "describe_row", "imported", "named_rewards", "unique_names"]

RewardFunction = Callable[..., Any]
"""A reward in any convention: a function or a callable object, such as
`reward(prompts, completions, completion_ids, **columns) -> list[float | None]`."""

_THE_STEP = frozenset({"trainer_state", "step", "run"})  # who takes one of these may say something else in another step


@runtime_checkable
class NamesColumns(Protocol):
    """A reward that takes **columns and says which of them it cannot do without."""

    @property
    def required_columns(self) -> tuple[str, ...]:
        """Names of data set columns."""
        ...


@runtime_checkable
class SaysPerSample(Protocol):
    """A reward that says whether a row's value depends on that row alone."""

    @property
    def per_sample(self) -> bool:
        """Whether it does: then it may be remembered, asked for once, and asked for apart from other rows."""
        ...


@runtime_checkable
class SaysRemote(Protocol):
    """A reward that says whether it is slow, costs money and may fail."""

    @property
    def remote(self) -> bool:
        """Whether it is."""
        ...


@runtime_checkable
class TakesSteps(Protocol):
    """What an environment of several turns has and a reward does not."""

    @property
    def step(self) -> Any:
        """Goes on by one turn."""
        ...


class NamedReward:
    """One reward function, its name, and what is known of it before it is called.

    Args:
        name: What logs and error messages call it.
        function: A function or a callable object; from a class, or a function that makes rewards, one is made with
            the setting ``reward_kwargs``.
        settings: What the user says of it; None for nothing.

    Raises:
        ValueError: If it cannot be called, follows no known convention, or more than one.
    """

    name: str
    function: RewardFunction
    convention: Convention
    per_sample: bool
    """Whether a row's value depends on that row alone, so that it may be remembered."""
    remote: bool
    """Whether it is slow, costs money and may fail."""
    identity: str
    """What decides its values; the key of what is remembered."""
    is_async: bool
    importable: str | None
    """The path by which another process finds the function; None where it would not."""

    def __init__(self, name: str, function: RewardFunction, settings: Reward | None = None) -> None:
        settings = Reward(function) if settings is None else settings
        self.name, self._settings = name, settings
        self.timeout, self.on_failure = settings.timeout, settings.on_failure
        self.function, self._fixed = _made(name, function, settings)
        inner = inspect.unwrap(self.function)  # a wrapper (rewards/shaping.py) is what it wraps, but for its values
        if isinstance(inner, TakesSteps):
            raise multi_turn(name, f"{short(type(inner).__name__)} has a method `step`")
        self._columns = tuple(inner.required_columns) if isinstance(inner, NamesColumns) else ()
        parameters = parameters_of(name, self.function, settings.columns).without(self._fixed)
        self.convention = recognise(name, parameters, settings.convention)
        self.is_async = any(map(inspect.iscoroutinefunction, (inner, type(inner).__call__)))
        self.remote = isinstance(inner, SaysRemote) and inner.remote
        declared = inner.per_sample if isinstance(inner, SaysPerSample) else self.convention.per_sample
        self.per_sample = declared if settings.per_sample is None else settings.per_sample
        self.per_sample &= not parameters.wanted & _THE_STEP
        self.identity = identity_of(
            self.function, version=settings.version, settings=[self.convention.name, self._fixed, settings.columns]
        )
        as_text = isinstance(settings.function, str) and function is self.function
        self.importable = importable(str(settings.function)) if as_text else path_of(self.function)

    def check(self, columns: Collection[str]) -> None:
        """Raise ValueError where data with these columns lacks what the function needs."""
        self.convention.check(columns)
        known = {*columns, *self.convention.given, *OFFERED}
        mapped = [source for source in self._settings.columns.values() if source not in known]
        for name in (*mapped, *(name for name in self._columns if name not in columns)):
            available = ", ".join(columns) or "none"
            raise ValueError(f"Reward {self.name} needs the column {name!r}; the data has: {available}.")

    def calls(self, rows: Rows) -> list[dict[str, Any]]:
        """The keyword arguments of each call that the rows need: one for all of them, or one for each."""
        return [call | self._fixed for call in self.convention.calls(self._shown(rows))]

    def told(self, rows: Rows) -> list[dict[str, Any]]:
        """For each row what its value may depend on; with the identity, the key of what is remembered."""
        return self.convention.told(self._shown(rows))

    def values(self, results: Sequence[Any], rows: Rows) -> Answers:
        """What the calls' results, each a value or the exception that it raised, say of the rows.

        Raises:
            ValueError: If a result is nothing that the convention allows.
        """
        return self.convention.values(results, rows)

    def _shown(self, rows: Rows) -> Rows:
        return dataclasses.replace(rows, conversational=True) if self._settings.conversational else rows


def named_rewards(given: Sequence[RewardFunction | str | Reward]) -> list[NamedReward]:
    """Rewards ready to be asked, each with a name of its own.

    Args:
        given: Callables, what ``imported`` understands, or either with settings.

    Raises:
        ValueError: If one of them cannot be found, or cannot be called.
    """
    settings = [each if isinstance(each, Reward) else Reward(each) for each in given]
    functions = [imported(each.function) if isinstance(each.function, str) else each.function for each in settings]
    names = _numbered([each.name or _name(function) for each, function in zip(settings, functions, strict=True)])
    return [NamedReward(*one) for one in zip(names, functions, settings, strict=True)]


def unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The names of the functions, or of the objects' classes; f1, f1_2, f1_3 where one repeats."""
    return _numbered([_name(function) for function in functions])


def parameters_of(name: str, function: RewardFunction, columns: Mapping[str, str]) -> Parameters:
    """What a function takes, with a column map applied.

    Raises:
        ValueError: If it does not tell, cannot be called with names, or the map names an argument it does not have.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError as error:
        raise ValueError(f"Reward {name} does not tell its parameters: wrap it in a Python function.") from error
    if any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in parameters):
        raise ValueError(f"Reward {name} takes positional-only arguments, and is called with names.")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = [p.name for p in named]
    if (unknown := columns.keys() - accepted) and not takes_all:
        raise ValueError(f"columns names {sorted(unknown)}, and reward {name} takes {', '.join(accepted)}.")
    sources = {argument: columns.get(argument, argument) for argument in (*accepted, *sorted(unknown))}
    return Parameters(sources, frozenset(p.name for p in named if p.default is p.empty), takes_all)


def _made(name: str, function: RewardFunction, settings: Reward) -> tuple[RewardFunction, dict[str, Any]]:
    """The function to call, and what it is given in every call."""
    given = settings.reward_kwargs
    if not callable(function):
        raise ValueError(f"reward holds {short(function)}, which is neither a function nor an import path.")
    if isinstance(function, type):
        if isinstance(function, TakesSteps):
            raise multi_turn(name, "it has a method `step`")
        if not given:
            raise ValueError(
                f"Reward {name} is a class: give an instance, in YAML with class_path and init_args, or the arguments "
                "of one as reward_kwargs."
            )
        return _call(name, function, given), {}
    parameters = parameters_of(name, function, settings.columns)
    if unknown := given.keys() - parameters.sources.keys():
        if not parameters.takes_all:
            raise ValueError(
                f"reward_kwargs names {sorted(unknown)}, and reward {name} takes {', '.join(parameters.sources)}."
            )
    elif given and makes_rewards(parameters.without(given)):
        return _call(name, function, given), {}
    return function, dict(given)


def _call(name: str, function: RewardFunction, arguments: Mapping[str, Any]) -> RewardFunction:
    try:
        made = function(**arguments)
    except TypeError as error:
        raise ValueError(f"Reward {name} cannot be made with reward_kwargs ({listed(arguments)}): {error}.") from error
    if not callable(made):
        raise ValueError(
            f"Reward {name} takes no completions, and what it made with reward_kwargs ({listed(arguments)}) is no "
            f"reward either, for it cannot be called: {short(made)}."
        )
    return made


def _name(function: RewardFunction) -> str:
    function = inspect.unwrap(function)
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, type):
        return function.__name__
    name = function.__name__ if inspect.isroutine(function) else type(function).__name__
    return name.strip("<>")


def _numbered(names: Sequence[str]) -> list[str]:
    earlier = [names[:place].count(name) for place, name in enumerate(names)]
    return [f"{name}_{before + 1}" if before else name for name, before in zip(names, earlier, strict=True)]
