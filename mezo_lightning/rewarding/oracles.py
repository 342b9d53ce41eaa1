"""One pairwise oracle: how it is called, and what may be believed of what it answers.

    oracle(prompts, first, second, **columns) -> list[float | None | Exception]

One answer a pair: 1 if the first completion is better, -1 if the second one is, 0 for a tie, and 2 P - 1 for a
probability P that the first is better. None is no opinion; an exception in the list is a pair that failed, with its
cause. In all else an oracle is like a reward, and is asked by the same means: it may be async, have a time limit, be
remembered, or be waited for while it is down.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

from mezo_lightning.data.batch import Batch
from mezo_lightning.probes import Probe
from mezo_lightning.rewarding.answers import Answers
from mezo_lightning.rewarding.arguments import FromRows, Rows
from mezo_lightning.rewarding.asking import Asker, failure_text
from mezo_lightning.rewarding.conventions import PROMPTS, TEXTS, TRL
from mezo_lightning.rewarding.functions import NamedReward, describe_row, parameters_of, unique_names
from mezo_lightning.rewarding.importing import imported
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.memory import Memory
from mezo_lightning.rewarding.rewards import OnFailure
from mezo_lightning.rewarding.settings import Reward

Preference = float | Exception | None
"""Of one pair: an answer in [-1, 1], no opinion, or why there is none."""


class Oracle:
    """A pairwise oracle that is ready to be asked.

    Args:
        oracle: A function, a callable object, the import path of either, or one of these with settings.
        on_failure: What a pair that fails does where the oracle's own settings do not say: "raise" ends the run, "mask"
            leaves the pair's sample out of the step; None masks for an oracle that is remote, and raises for others.
        cache: An SQLite file that keeps the answers about single pairs; None to keep them in memory.
        patience: Seconds that the run waits for a remote oracle that answers nothing.

    Raises:
        ValueError: If it cannot be found, or cannot be called with ``first`` and ``second``.
    """

    def __init__(
        self,
        oracle: str | Reward | Callable[..., Any],
        on_failure: OnFailure | None = None,
        *,
        cache: str | None = None,
        patience: float = 600.0,
    ):
        if on_failure not in ("mask", "raise", None):
            raise ValueError(f"on_failure={on_failure!r} must be 'mask', 'raise' or null.")
        self._named = _named(oracle)
        policy = self._named.on_failure or on_failure or ("mask" if self._named.remote else "raise")
        self._asker = Asker(self._named, Memory(cache), mask=policy == "mask", patience=patience)
        self._answered = False

    @property
    def name(self) -> str:
        """What logs call it."""
        return self._named.name

    def check(self, columns: Collection[str]) -> None:
        """Raise ValueError where a required column is missing, or a column has the name of an argument."""
        self._named.check(columns)

    def ask(
        self, batch: Batch, first: Sequence[str], second: Sequence[str], probe: Probe, tally: Tally
    ) -> list[Preference]:
        """Ask which completion is better, for each row.

        Args:
            batch: The rows.
            first: A completion of each.
            second: Another one.
            probe: When, and by whom.
            tally: Counts what happens.

        Raises:
            ValueError: If what it returns is not a list of one answer in [-1, 1] for each row, or it refuses its first
                call.
            RuntimeError: For failures that are not masked, and where the first call fails for every row.
        """
        compared = dataclasses.replace(batch, columns={**batch.columns, _SECOND: tuple(second)})
        rows = Rows(compared, first, extras=_told(probe))
        heard = self._asker.begin(rows, range(len(rows)), tally, startup=not self._answered)()
        strict = not self._answered and len(heard.failures) == len(rows)
        self._answered |= bool(heard.answers)
        for place, error in heard.failures.items():
            if strict or not self._asker.mask:
                text = failure_text(self.name, error, rows, place, len(heard.failures) - 1)
                raise (ValueError if isinstance(error, ValueError) else RuntimeError)(text) from error
            self._asker.failure_log.note(error, describe_row(batch, first, place))
        return [heard.failures.get(place) or heard.answers[place].value for place in range(len(rows))]


_SECOND = "second"


class _Pairwise(TRL):
    """``oracle(prompts, first, second, **columns) -> list[float | None]``."""

    name = "pairwise"
    about = "a comparison of two completions"
    given: ClassVar = {
        "prompts": PROMPTS,
        "first": TEXTS,
        _SECOND: FromRows(lambda rows: rows.batch.columns[_SECOND], "second completion"),
    }


class _NamedOracle(NamedReward):
    """A reward function that compares."""

    def __init__(self, name: str, function: Callable[..., Any], settings: Reward):
        super().__init__(name, function, dataclasses.replace(settings, convention="trl"))
        parameters = parameters_of(name, self.function, settings.columns).without(self._fixed)
        if not {"first", _SECOND} <= parameters.wanted:
            raise ValueError(
                f"oracle {name} takes {', '.join(sorted(parameters.sources)) or 'nothing'}, and should take `first` "
                "and `second`, the two completions of each prompt. What gives scores to single completions goes into "
                "a RewardObjective, or becomes an oracle by rewards.pairwise.ByScore."
            )
        self.convention = _Pairwise(name, parameters, chosen=True)

    def values(self, results: Sequence[Any], rows: Rows) -> Answers:
        answers = super().values(results, rows)
        for result in results:
            if isinstance(result, (list, tuple)) and any(isinstance(answer, bool) for answer in result):
                raise ValueError(
                    f"oracle {self.name} answers with True and False: 1 means that the first is better, -1 that the "
                    "second is, 0 a tie"
                )
        for place, value in enumerate(answers.values):
            if isinstance(value, float) and abs(value) > 1:
                raise ValueError(
                    f"oracle {self.name} answered {value} for {describe_row(rows.batch, rows.completions, place)}, and "
                    "answers are between -1 (the second is better) and 1 (the first is)"
                )
        return answers


def _named(oracle: str | Reward | Callable[..., Any]) -> NamedReward:
    settings = oracle if isinstance(oracle, Reward) else Reward(oracle)
    function = imported(settings.function) if isinstance(settings.function, str) else settings.function
    if settings.convention is not None:
        raise ValueError(f"convention={settings.convention!r} is for rewards: oracles take prompts, first and second.")
    [name] = unique_names([function])
    return _NamedOracle(settings.name or name, function, settings)


def _told(probe: Probe) -> dict[str, Any]:
    """What an oracle may know of the run."""
    state = SimpleNamespace(global_step=probe.step, max_steps=probe.max_steps)
    return {"trainer_state": state, "step": probe.step, "run": probe.run}
