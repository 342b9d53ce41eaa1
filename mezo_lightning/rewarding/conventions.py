"""The ways in which reward functions are called: one small class for each library's.

A convention turns rows into the keyword arguments of calls, and what the calls returned into one value a row; it calls
nothing. A function is told the names that it takes and nothing else. Which convention a function follows is found in
``recognition.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from mezo_lightning.rewarding.answers import Answers, Value, of_entries, of_list, single
from mezo_lightning.rewarding.arguments import (
    OFFERED,
    TRL_EXTRAS,
    FromColumn,
    FromGroundTruth,
    FromRows,
    Parameters,
    Rows,
    Source,
    completions,
    ids,
    prompts,
    queries,
)

PROMPTS, COMPLETIONS = FromRows(prompts, "prompt"), FromRows(completions, "completion")
IDS = FromRows(ids, "completion as token ids")
TEXTS = FromRows(lambda rows: rows.completions, "completion")  # as text, whatever the rows are
DATA_SOURCE, EXTRA_INFO = FromColumn(("data_source",), str), FromColumn(("extra_info",), dict)
GROUND_TRUTH = FromGroundTruth()
_VERIFIERS: Mapping[str, Source] = {
    "prompt": PROMPTS,
    "completion": COMPLETIONS,
    "answer": FromColumn(("answer",)),
    "info": FromColumn(("info",), dict),
    "task": FromColumn(("task",), lambda: "default"),
}


def _states(rows: Rows) -> list[dict[str, Any]]:
    """What verifiers keeps of a rollout, as far as one answer to one prompt has it."""
    told = {name: source(rows) for name, source in _VERIFIERS.items()}
    told = {name: list(values) for name, values in rows.batch.columns.items()} | told
    return [{name: values[row] for name, values in told.items() if values is not None} for row in range(len(rows))]


class Convention(ABC):
    """How one reward function is called, and what its results mean."""

    name: ClassVar[str]
    about: ClassVar[str]
    """Where the convention comes from, for people."""
    per_sample: ClassVar[bool]
    """Whether a row's value depends on that row alone, as far as the convention says."""
    given: ClassVar[Mapping[str, Source]]
    """The arguments that the convention itself fills in; columns of the data come beside them."""

    def __init__(self, reward: str, parameters: Parameters, chosen: bool = False):
        """Keeps what it is about.

        Args:
            reward: The reward's name, for error messages.
            parameters: What the function takes.
            chosen: Whether the user named this convention; else it was recognised.
        """
        self.reward = reward
        self.parameters = parameters
        self.chosen = chosen

    def check(self, columns: Collection[str]) -> None:
        """Raise ValueError where the function needs something that data with these columns does not have."""
        given = self.given_for(columns)
        for name in self.parameters.needed:
            there = given[name].available(columns) if name in given else name in columns
            if not there and name not in OFFERED:
                raise ValueError(self._lacks(name, columns))

    def calls(self, rows: Rows) -> list[dict[str, Any]]:
        """The keyword arguments of each call that the rows need."""
        offered, fixed = self._offered(rows)
        for name in self.parameters.needed:
            if name not in offered and name not in fixed:
                raise ValueError(f"Reward {self.reward} needs {name!r}, which these rows do not have.")
        spare = self._spare(rows.batch.columns)
        return [self.parameters.pick(call, spare) for call in self._arrange(offered, fixed, len(rows))]

    def told(self, rows: Rows) -> list[dict[str, Any]]:
        """For each row what its value may depend on, the same where the function would say the same."""
        offered, _ = self._offered(rows)
        # What a ``**kwargs`` gets of tokens hardly ever counts, and equal texts may end in different ones.
        spare = [name for name in self._spare(rows.batch.columns) if name != "completion_ids"]
        each_row = ({name: values[row] for name, values in offered.items()} for row in range(len(rows)))
        return [self.parameters.pick(row, spare) for row in each_row]

    def values(self, results: Sequence[Any], rows: Rows) -> Answers:
        """What the results of the calls, each a value or an exception, say of the rows.

        Raises:
            ValueError: If a result is nothing that the convention allows.
        """
        assert len(results) == len(rows)
        return of_entries(self.reward, results, rows.batch, rows.completions)

    def reason(self, columns: Collection[str] | None = None) -> str:
        """Why a function is called in this way, in words."""
        del columns
        return "you chose it" if self.chosen else f"it takes {listed(self.parameters.wanted & set(self.given))}"

    def _offered(self, rows: Rows) -> tuple[dict[str, list[Any]], dict[str, Any]]:
        """What there is to tell: with one value a row, and the same for all rows."""
        offered = {name: list(values) for name, values in rows.batch.columns.items()}
        if rows.finish_reasons is not None:
            offered.setdefault("finish_reasons", list(rows.finish_reasons))
        given = self.given_for(rows.batch.columns)
        for name in given if self.parameters.takes_all else given.keys() & self.parameters.wanted:
            values = given[name](rows)
            if values is not None:
                offered[name] = values
        return offered, {name: value for name, value in rows.extras.items() if name not in offered}

    def given_for(self, columns: Collection[str]) -> Mapping[str, Source]:
        """The arguments that the convention fills in, where data has these columns."""
        del columns
        return self.given

    @abstractmethod
    def _arrange(self, offered: Mapping[str, list[Any]], fixed: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        """What is offered to each call."""

    def _spare(self, columns: Collection[str]) -> Collection[str]:
        """What a ``**kwargs`` is given; in most conventions it is there for the user's own settings."""
        del columns
        return ()

    def _lacks(self, name: str, columns: Collection[str]) -> str:
        return f"Reward {self.reward} needs the column {name!r}; the data has: {', '.join(columns) or 'none'}."


class _Listed(Convention):
    """One call for all rows."""

    per_sample = False

    def _arrange(self, offered: Mapping[str, list[Any]], fixed: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        return [{**offered, **fixed}]

    def values(self, results: Sequence[Any], rows: Rows) -> Answers:
        (result,) = results
        if isinstance(result, Exception):
            failed: list[Value] = [result] * len(rows)
            return Answers(failed)
        return of_list(self.reward, result, rows.batch, rows.completions)


class _ByRow(Convention):
    """One call a row."""

    per_sample = True

    def _arrange(self, offered: Mapping[str, list[Any]], fixed: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        return [{**{name: values[row] for name, values in offered.items()}, **fixed} for row in range(size)]


class TRL(_Listed):
    """``reward(prompts, completions, completion_ids, **columns) -> list[float | None]``."""

    name = "trl"
    about = "TRL's GRPOTrainer"
    given: ClassVar = {"prompts": PROMPTS, "completions": COMPLETIONS, "completion_ids": IDS}

    def check(self, columns: Collection[str]) -> None:
        told = set(columns) if self.parameters.takes_all else self.parameters.wanted
        for name in sorted(told & self.given.keys() & set(columns)):
            raise ValueError(f"The data's column {name!r} has the name of an argument of rewards: rename the column.")
        super().check(columns)

    def reason(self, columns: Collection[str] | None = None) -> str:
        if not self.chosen and not self.parameters.wanted & self.given.keys():
            return "it takes any name"
        return super().reason(columns)

    def _spare(self, columns: Collection[str]) -> Collection[str]:
        return (*self.given, *columns, *TRL_EXTRAS)

    def _lacks(self, name: str, columns: Collection[str]) -> str:
        lacks = super()._lacks(name, columns)
        if name != "answers" or self.chosen:
            return lacks
        return (
            f"{lacks} It could be one of two: trl, whose answers are a column, or verifiers_group, whose answers are "
            f"those of the rows. If it is the latter, set convention: {VerifiersGroup.name}."
        )


class Verl(_ByRow):
    """``compute_score(data_source, solution_str, ground_truth, extra_info)``, a number or a dict with ``score``."""

    name = "verl"
    about = "verl's compute_score"
    given: ClassVar = {
        "data_source": DATA_SOURCE,
        "solution_str": TEXTS,
        "ground_truth": GROUND_TRUTH,
        "extra_info": EXTRA_INFO,
    }


class VerlBatch(_Listed):
    """``compute_score(data_sources, solution_strs, ground_truths, extra_infos) -> list``."""

    name = "verl_batch"
    about = "verl's batch reward manager"
    given: ClassVar = {
        "data_sources": DATA_SOURCE,
        "solution_strs": TEXTS,
        "ground_truths": GROUND_TRUTH,
        "extra_infos": EXTRA_INFO,
    }


class OpenRLHF(_ByRow):
    """``reward_func(queries, prompts, labels, **kwargs) -> {"rewards": ...}``, with lists of one as OpenRLHF does."""

    name = "openrlhf"
    about = "OpenRLHF's reward_func"
    given: ClassVar = {
        "queries": FromRows(queries, "prompt and completion"),
        "prompts": FromRows(lambda rows: rows.batch.prompts, "prompt"),
        "labels": FromColumn(("labels", "label")),
    }

    def _arrange(self, offered: Mapping[str, list[Any]], fixed: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
        return [{**{name: [values[row]] for name, values in offered.items()}, **fixed} for row in range(size)]

    def values(self, results: Sequence[Any], rows: Rows) -> Answers:
        return super().values([single(result) for result in results], rows)


class Verifiers(_ByRow):
    """A function of a verifiers ``Rubric``: any of prompt, completion, answer, state, info, task, and columns."""

    name = "verifiers"
    about = "a rubric of verifiers before 0.4"
    given: ClassVar = {**_VERIFIERS, "state": FromRows(_states, "what is known of the row")}

    def _spare(self, columns: Collection[str]) -> Collection[str]:
        return (*self.given, *columns)

    def _lacks(self, name: str, columns: Collection[str]) -> str:
        if name != "parser":
            return super()._lacks(name, columns)
        return f"Reward {self.reward} needs a parser of verifiers: give it one in reward_kwargs: {{parser: ...}}."


class VerifiersGroup(_Listed):
    """A group function of a verifiers ``Rubric``: the plural names, a list of values."""

    name = "verifiers_group"
    about = "a group function of a rubric of verifiers before 0.4"
    given: ClassVar = {
        "prompts": PROMPTS,
        "completions": COMPLETIONS,
        "answers": _VERIFIERS["answer"],
        "infos": _VERIFIERS["info"],
        "tasks": _VERIFIERS["task"],
        "states": FromRows(_states, "what is known of the row"),
    }

    def _spare(self, columns: Collection[str]) -> Collection[str]:
        return (*self.given, *columns)


class TwoArguments(_ByRow):
    """A function of the completion and of one column, whatever it calls the completion: told apart by the column."""

    name = "es"
    about = "a function of the completion and a column, as in es-at-scale and NeMo-RL"
    given: ClassVar = {"prompt": PROMPTS, "ground_truth": GROUND_TRUTH}

    def reason(self, columns: Collection[str] | None = None) -> str:
        if columns is None:
            return super().reason() if self.chosen else "it requires two arguments"
        name = self._completion(columns)
        return f"all it requires but {name!r} are columns, so {name!r} is the completion"

    def given_for(self, columns: Collection[str]) -> Mapping[str, Source]:
        return {**self.given, self._completion(columns): COMPLETIONS}

    def _completion(self, columns: Collection[str]) -> str:
        """The name of the required argument that is no column."""
        needed = [name for name in self.parameters.needed if name not in OFFERED]
        known = {name for name in needed if name in columns or (name in self.given and self._available(name, columns))}
        others = [name for name in needed if name not in known]
        if len(others) != 1:
            raise ValueError(unrecognised(self.reward, self.parameters, columns))
        return others[0]

    def _available(self, name: str, columns: Collection[str]) -> bool:
        return self.given[name].available(columns)


class _Positional(Convention):
    """Arguments in a fixed order, whatever their names are."""

    order: ClassVar[tuple[Source, ...]]

    def given_for(self, columns: Collection[str]) -> Mapping[str, Source]:
        return dict(zip(self.parameters.sources.values(), self.order, strict=False))


class Prime(_Positional, _ByRow):
    """``compute_score(task, completion, reference, extra_info)`` by position."""

    name = "prime"
    about = "verl's prime reward manager"
    order = (DATA_SOURCE, TEXTS, GROUND_TRUTH, EXTRA_INFO)
    given: ClassVar = {}


class OpenRLHFByPosition(_Positional, OpenRLHF):
    """``reward_func(query, prompt, label)`` by position: what OpenRLHF does with a function of other names."""

    order = tuple(OpenRLHF.given.values())


CONVENTIONS: Mapping[str, type[Convention]] = {
    kind.name: kind for kind in (TRL, Verl, VerlBatch, OpenRLHF, Verifiers, VerifiersGroup, TwoArguments, Prime)
}


def unrecognised(reward: str, parameters: Parameters, columns: Collection[str] | None = None) -> str:
    """The error message for a function that follows no convention."""
    data = "" if columns is None else f" The data's columns are {', '.join(columns) or 'none'}."
    return (
        f"Reward {reward} takes {listed(parameters.sources) or 'no argument'}, from which no convention can be "
        f"recognised.{data} A reward takes completions (TRL), solution_str (verl), queries (OpenRLHF), completion "
        "(verifiers), or requires two arguments, one of them a column of the data. Map its arguments with columns: "
        f"{{argument: column}}, or set convention to one of {', '.join(CONVENTIONS)}."
    )


def listed(names: Collection[str]) -> str:
    """Names for a message."""
    return ", ".join(map(repr, sorted(names)))
