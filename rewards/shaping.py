"""Rewards on the shape of a completion, and wrappers that change what another reward says.

Terms stand beside other rewards and are weighed with them: ``LengthPenalty``, ``SoftOverlong``, ``RepetitionPenalty``.
Wrappers take another reward, in whatever convention it is written, and give its values changed: ``Clip``, ``Scale``,
``FormatGate``. None (no opinion) and failures (exceptions, NaN, infinity) pass through all of them as they are.
"""

import importlib
import inspect
import math
import numbers
import re
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Protocol, runtime_checkable

_MANY = frozenset({"completions", "completion_ids", "solution_strs"})  # who takes one of these values several rows


# -- terms -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthPenalty:
    """Minus ``per_word`` for each word of the completion beyond the first ``free``."""

    per_word: float = 0.01
    """What a word costs."""

    free: int = 0
    """How many words cost nothing."""

    at_most: float = 1.0
    """The largest penalty."""

    per_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_finite(self, "per_word", "at_most")
        if self.free < 0:
            raise ValueError(f"LengthPenalty(free={self.free}) must be at least 0.")

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """A penalty in [-at_most, 0] for each completion."""
        over = [max(0, len(completion.split()) - self.free) for completion in completions]
        return [-min(self.per_word * words, self.at_most) for words in over]


@dataclass(frozen=True)
class SoftOverlong:
    """DAPO's penalty of long completions (Yu et al. 2025, arXiv 2503.14476, equation 13), by length in tokens.

    0 up to ``limit - margin`` tokens, from there down to -1 at ``limit`` in a straight line, and -1 beyond.
    """

    limit: int
    """Tokens from which on the penalty is whole; max_new_tokens of the completer is a good one."""

    margin: int
    """Over how many tokens it grows."""

    per_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.margin <= self.limit:
            raise ValueError(f"SoftOverlong(margin={self.margin}) must be from 1 to limit={self.limit}.")

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        """A penalty in [-1, 0] for each completion."""
        start = self.limit - self.margin
        return [-min(max(len(ids) - start, 0) / self.margin, 1.0) for ids in completion_ids]


@dataclass(frozen=True)
class RepetitionPenalty:
    """Minus the share of n-grams of words that occurred before (Yeo et al. 2025, arXiv 2502.03373, appendix C.2).

    Words where the paper counts tokens, so that the penalty does not depend on the tokenizer.
    """

    size: int = 3
    """Words in an n-gram."""

    weight: float = 1.0
    """The penalty of a text that says nothing new."""

    per_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_finite(self, "weight")
        if self.size < 1:
            raise ValueError(f"RepetitionPenalty(size={self.size}) must be at least 1.")

    def __call__(self, completions: Sequence[str]) -> list[float]:
        """A penalty in [-weight, 0] for each completion; 0 for one without any n-gram."""
        return [-self.weight * self._repeated(completion.lower().split()) for completion in completions]

    def _repeated(self, words: Sequence[str]) -> float:
        grams = [tuple(words[place : place + self.size]) for place in range(len(words) - self.size + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


# -- wrappers ----------------------------------------------------------------------------------------------------------


@runtime_checkable
class _Array(Protocol):
    """A tensor, an array, or a number of NumPy's."""

    def tolist(self) -> Any: ...


class Wrapper(ABC):
    """Another reward, with its values changed.

    To whoever reads its signature it is what it wraps (as with ``functools.wraps``), so it is called in the same way.
    """

    reward: str | Callable[..., Any]

    def __post_init__(self) -> None:
        inner = _imported(self.reward) if isinstance(self.reward, str) else self.reward
        if not callable(inner) or isinstance(inner, type):
            raise ValueError(f"{type(self).__name__}(reward={self.reward!r}) is no function and no callable object.")
        vars(self)["__wrapped__"] = inner  # not a property: the signature of this class would be that of a property

    @abstractmethod
    def _changed(self, value: float) -> float:
        """What becomes of one value."""

    def __call__(self, **arguments: Any) -> Any:
        """What the other reward returns, changed; awaitable where that is."""
        result = self._inner(**arguments)
        return self._awaited(result, arguments) if inspect.isawaitable(result) else self._all(result, arguments)

    async def _awaited(self, result: Awaitable[Any], arguments: Mapping[str, Any]) -> Any:
        return self._all(await result, arguments)

    def _all(self, result: Any, arguments: Mapping[str, Any]) -> Any:
        del arguments
        many = bool(_MANY.intersection(inspect.signature(self._inner).parameters))
        return _changed(result, self._changed, many)

    @property
    def _inner(self) -> Callable[..., Any]:
        return vars(self)["__wrapped__"]


@dataclass(frozen=True)
class Clip(Wrapper):
    """Another reward, held between two values."""

    reward: str | Callable[..., Any]
    """The other reward: its import path or class_path."""

    low: float = -math.inf
    """The least value."""

    high: float = math.inf
    """The greatest value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"Clip(low={self.low}) must be below high={self.high}.")

    def _changed(self, value: float) -> float:
        return min(max(value, self.low), self.high)


@dataclass(frozen=True)
class Scale(Wrapper):
    """Another reward, ``factor * value + offset``."""

    reward: str | Callable[..., Any]
    """The other reward: its import path or class_path."""

    factor: float = 1.0
    """What each value is multiplied with; -1 for a score where lower is better."""

    offset: float = 0.0
    """What is added then."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "factor", "offset")

    def _changed(self, value: float) -> float:
        return self.factor * value + self.offset


@dataclass(frozen=True)
class FormatGate(Wrapper):
    """Another reward, in TRL's convention, that counts only where the completion has a certain form."""

    reward: str | Callable[..., Any]
    """The other reward: its import path or class_path."""

    pattern: str
    r"""Regular expression that must match the whole completion, spaces at its ends aside; the dot matches newlines."""

    otherwise: float = 0.0
    """The value where it does not match."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "otherwise")
        try:
            _ = self._regex
        except re.error as error:
            raise ValueError(f"FormatGate(pattern={self.pattern!r}) is no regular expression: {error}.") from error
        if "completions" not in inspect.signature(self._inner).parameters:
            raise ValueError(f"FormatGate(reward={self.reward!r}): that reward takes no `completions`, as TRL has.")

    def _all(self, result: Any, arguments: Mapping[str, Any]) -> Any:
        if isinstance(result, Mapping):
            key = _key(result)
            return {name: self._all(value, arguments) if name == key else value for name, value in result.items()}
        values = result.tolist() if isinstance(result, _Array) else list(result)
        return [
            value if self._fits(completion) else _changed(value, lambda _: self.otherwise, many=False)
            for value, completion in zip(values, arguments["completions"], strict=True)
        ]

    def _fits(self, completion: Any) -> bool:
        # As TRL shows it, a completion may be a list of messages.
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        return self._regex.fullmatch(text.strip()) is not None

    def _changed(self, value: float) -> float:
        return value

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern, re.DOTALL)


def _changed(result: Any, change: Callable[[float], float], many: bool) -> Any:
    """The same thing with its values changed: a number, or what rewards put numbers in.

    Args:
        result: What a reward returned.
        change: What to do with a number.
        many: Whether a tuple holds the values of several rows; else it is a value with something beside it.
    """
    if isinstance(result, _Array):
        result = result.tolist()
    if isinstance(result, Mapping):
        key = _key(result)
        return {name: _changed(value, change, many) if name == key else value for name, value in result.items()}
    if isinstance(result, list) or (many and isinstance(result, tuple)):
        return [_changed(value, change, many=False) for value in result]
    if isinstance(result, tuple):  # (label, reward) or (reward, details)
        place = 1 if result and isinstance(result[0], str) else 0
        return tuple(_changed(value, change, False) if i == place else value for i, value in enumerate(result))
    return change(float(result)) if _is_value(result) else result


def _key(result: Mapping[Any, Any]) -> str | None:
    """Where a mapping has its rewards."""
    return next((key for key in ("rewards", "reward", "score") if key in result), None)


def _is_value(result: Any) -> bool:
    """Whether this is a number that counts: NaN and infinity are failures, and clipping would hide them."""
    return isinstance(result, numbers.Real) and math.isfinite(result)


def _check_finite(reward: Any, *names: str) -> None:
    for name in names:
        value = getattr(reward, name)
        if not math.isfinite(value):
            raise ValueError(f"{type(reward).__name__}({name}={value}) must be a finite number.")


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(":" if ":" in path else ".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"reward={path!r}: {error}. Write the import path of a function: rewards.squad.f1.") from error
