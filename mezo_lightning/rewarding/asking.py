"""Asking one reward about completions: never twice for an answer that was received, and patiently where it is down.

A reward whose value of a row depends on that row alone is asked about each different row once; what it answered is
remembered. Any other one is asked once a probe, about the whole batch. Failures are never remembered.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tenacity

from mezo_lightning.rewarding.answers import Note, Value, describe_row
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.calls import Wait, caller_of
from mezo_lightning.rewarding.functions import NamedReward
from mezo_lightning.rewarding.log import FailureLog, Tally, described, listeners
from mezo_lightning.rewarding.memory import Answer, Memory, Question, question

log = logging.getLogger(__name__)

_SEVERAL = 4  # different questions in a row without an answer: not the questions, but the reward is at fault
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds


class NotFinite(ValueError):
    """A reward returned NaN or infinity."""


class RewardDownError(RuntimeError):
    """A remote reward answered nothing for as long as the run was told to wait."""


@dataclass
class Heard:
    """What one reward said of some rows of a batch, by their places in it."""

    answers: dict[int, Answer] = field(default_factory=dict)
    failures: dict[int, Exception] = field(default_factory=dict)
    received: dict[Question, Answer] = field(default_factory=dict)
    """Answers that were not known before."""


@dataclass(frozen=True)
class Calls:
    """Calls under way about N rows."""

    wait: Wait
    notes: list[dict[str, Note]]
    """What is said of each row beside its value, as it is said."""


class Asker:
    """Asks one reward.

    Args:
        reward: The reward.
        memory: What rewards have answered.
        mask: Whether its failures are masked, so that the run may wait for it to come back.
        patience: Seconds that the run waits for a remote reward that is down.
    """

    def __init__(self, reward: NamedReward, memory: Memory, *, mask: bool, patience: float):
        self.reward = reward
        self.mask = mask
        self.failure_log = FailureLog(reward.name)
        self.by_row = reward.per_sample
        """Whether rows are asked about apart from one another, and remembered."""
        self.waits = reward.remote and reward.is_async
        """Whether asking is waiting for a service, so that one process can do it for all at no loss."""
        self._memory = memory
        self._patience = patience
        self._caller = caller_of(
            reward.function,
            is_async=reward.is_async,
            importable=reward.importable,
            timeout=reward.timeout,
            parallel=reward.convention.per_sample,
            name=reward.name,
        )
        self._has_answered = False
        self._unanswered: set[Any] = set()
        """Different questions since the last answer."""

    def begin(self, rows: Rows, places: Sequence[int], tally: Tally, *, startup: bool = False) -> Callable[[], Heard]:
        """Start to ask; what is returned waits for the answers.

        Args:
            rows: The whole batch.
            places: The rows to ask about.
            tally: Counts what happens.
            startup: Nothing is waited for: a reward that is down before the first step is one that never worked.
        """
        questions = self._questions(rows, places)
        known = self._memory.recall(questions.values())
        first = {each: place for place, each in reversed(questions.items()) if each is not None}
        todo = [p for p, each in questions.items() if each is None or (each not in known and first[each] == p)]
        tally.remembered += len(places) - len(todo)
        asking = _Asking(self, rows.select(todo), tally) if todo else None

        def finish() -> Heard:
            if asking is None:
                return self._heard({}, questions, known)
            may_wait = self.mask and self.reward.remote and not startup
            outcomes = self._patiently(asking) if may_wait else asking.outcomes()
            return self._heard(dict(zip(todo, outcomes, strict=True)), questions, known)

        return finish

    def announce(self) -> None:
        """Say before the run what will be done about failures, where these are to be expected."""
        if self.reward.remote:
            waits = f"where it answers nothing at all, the run waits for up to {self._patience:.0f} s"
            what = f"leave their sample out of the step, and {waits}" if self.mask else "end the run"
            log.warning("Reward %s is remote: failures %s.", self.reward.name, what)

    def _questions(self, rows: Rows, places: Sequence[int]) -> dict[int, Question | None]:
        if not self.by_row or not places:
            return dict.fromkeys(places)
        told = self.reward.told(rows.select(places))
        return {place: question(self.reward.identity, each) for place, each in zip(places, told, strict=True)}

    def start(self, rows: Rows, tally: Tally) -> Calls:
        """Start the calls that some rows need."""
        notes: list[dict[str, Note]] = [{} for _ in range(len(rows))]
        every = range(len(rows))
        calls = []
        for about in [[place] for place in every] if self.reward.convention.per_sample else [every]:
            said = listeners(self.reward.name, tally, [notes[place] for place in about])
            calls += self.reward.calls(dataclasses.replace(rows.select(about), extras={**rows.extras, **said}))
        return Calls(self._caller.start(calls), notes)

    def outcomes(self, calls: Calls, rows: Rows, tally: Tally) -> list[Answer | Exception]:
        """What calls said of some rows: an answer or why there is none, one a row.

        Raises:
            ValueError: For what the reward returned, if that is no list of values; or of the reward's own, if it has
                never answered yet: it is set up wrongly.
        """
        returned = calls.wait()
        tally.asked += len(rows)
        tally.seconds += [each.seconds for each in returned]
        errors = [each.value for each in returned if isinstance(each.value, ValueError)]
        if not self._has_answered and errors and len(errors) == len(returned):
            raise ValueError(f"Reward {self.reward.name} refused its first call: {errors[0]}") from errors[0]
        answers = self.reward.values([each.value for each in returned], rows)
        for name, column in answers.notes.items():
            tally.say(self.reward.name, name, column)
            for taken, note in zip(calls.notes, column, strict=True):
                if note is not None:
                    taken.setdefault(name, note)
        outcomes = [_outcome(*each) for each in zip(answers.values, calls.notes, strict=True)]
        tally.failed += sum(isinstance(outcome, Exception) for outcome in outcomes)
        return outcomes

    def _heard(
        self,
        outcomes: dict[int, Answer | Exception],
        questions: dict[int, Question | None],
        known: dict[Question, Answer],
    ) -> Heard:
        """Give each row the outcome of its question, and remember what is new."""
        by_question = known | {each: outcomes[place] for place in outcomes if (each := questions[place]) is not None}
        heard = Heard()
        for place, each in questions.items():
            outcome = outcomes[place] if each is None else by_question[each]
            if isinstance(outcome, Exception):
                heard.failures[place] = outcome
                continue
            heard.answers[place] = outcome
            if each is not None and each not in known:
                heard.received[each] = outcome
        self._memory.remember(heard.received)
        self._has_answered |= any(isinstance(outcome, Answer) for outcome in outcomes.values())
        return heard

    # -- waiting for a reward that is down -----------------------------------------------------------------------------

    def _patiently(self, asking: _Asking) -> list[Answer | Exception]:
        """The outcomes of the first time that anything is answered."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_result(lambda outcomes: self._is_down(asking.rows, outcomes)),
            wait=tenacity.wait_exponential(multiplier=_FIRST_PAUSE, max=_LONGEST_PAUSE),
            stop=tenacity.stop_after_delay(self._patience),
            before_sleep=self._say_that_it_is_down,
            retry_error_callback=self._give_up,
        )
        outcomes = retrying(asking.outcomes)
        if (waited := retrying.statistics.get("idle_for", 0.0)) > 0:
            log.warning("Reward %s answers again, after %.0f s: the run goes on.", self.reward.name, waited)
        return outcomes

    def _is_down(self, rows: Rows, outcomes: Sequence[Answer | Exception]) -> bool:
        """Whether nothing was answered, and not because of one strange row that may come again and again."""
        if not all(isinstance(outcome, Exception) for outcome in outcomes):
            self._unanswered.clear()
            return False
        self._unanswered.update(zip(rows.batch.prompts, rows.completions, strict=True))
        return len(self._unanswered) >= _SEVERAL

    def _say_that_it_is_down(self, state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        log.warning(
            "Reward %s answers nothing (%s): the run is paused, and asks again in %.0f s. It has been waiting for "
            "%.0f s, and gives up after %.0f s.",
            *(self.reward.name, described(state.outcome.result()[0]), state.upcoming_sleep),
            *(state.seconds_since_start or 0.0, self._patience),
        )

    def _give_up(self, state: tenacity.RetryCallState) -> Any:
        assert state.outcome is not None
        cause: Exception = state.outcome.result()[0]
        raise RewardDownError(
            f"Reward {self.reward.name} has answered nothing for {state.seconds_since_start:.0f} s, in "
            f"{state.attempt_number} attempts; the last one failed with {described(cause)}. The run ends here, and can "
            "be resumed from its last checkpoint once the reward is back (patience sets how long a run waits)."
        ) from cause


class _Asking:
    """Calls about some rows, which can be made again."""

    def __init__(self, asker: Asker, rows: Rows, tally: Tally):
        self.rows = rows
        self._asker = asker
        self._tally = tally
        self._calls: Calls | None = asker.start(rows, tally)

    def outcomes(self) -> list[Answer | Exception]:
        """What came of the calls; of new ones, from the second time on."""
        calls, self._calls = self._calls or self._asker.start(self.rows, self._tally), None
        return self._asker.outcomes(calls, self.rows, self._tally)


def _outcome(value: Value, notes: dict[str, Note]) -> Answer | Exception:
    if value is None or isinstance(value, Exception):
        return Answer(None, notes) if value is None else value
    return Answer(value, notes) if math.isfinite(value) else NotFinite(f"returned {value}")


def failure_text(reward: str, error: Exception, rows: Rows, place: int, others: int) -> str:
    """A failure as the run's last words.

    Args:
        reward: The reward's name.
        error: What happened.
        rows: The batch.
        place: Of the row in it.
        others: How many more rows failed.
    """
    where = describe_row(rows.batch, rows.completions, place)
    more = f" and {others} more rows" if others > 1 else " and one more row" if others else ""
    if isinstance(error, NotFinite):
        return (
            f"Reward {reward} {error} for {where}{more}. A row without a value must be None; or set on_failure to mask."
        )
    return f"Reward {reward} failed for {where}{more}: {described(error)}"
