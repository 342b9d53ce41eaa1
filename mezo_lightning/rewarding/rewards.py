"""Reward functions made one: weights, and what becomes of a reward that fails.

A failure never becomes a number (a 0.0 on one probe only would look like a slope): it ends the run, or it leaves out
the sample. None is no failure, it leaves out one component of a sample, as in TRL.

Of several processes, each asks about its own rows where a reward looks at rows one by one. Rank zero asks about all
rows where a reward needs the whole batch, and where it only waits for a service (``Asker.waits``): limits on requests
then hold for the whole job. All of them then know all answers.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from mezo_lightning.data.batch import Batch
from mezo_lightning.probes import Probe
from mezo_lightning.rewarding.answers import Note
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.asking import Asker, failure_text
from mezo_lightning.rewarding.functions import RewardFunction, describe_row, named_rewards
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.memory import Answer, Memory, Question
from mezo_lightning.rewarding.settings import Reward

OnFailure = Literal["mask", "raise"]


@dataclass(frozen=True)
class RewardValues:
    """What the rewards said of N completions."""

    values: Tensor
    """float64 [N, C]: a column for each reward, not weighted; NaN where it had no opinion or the sample failed."""

    failed: Tensor
    """bool [N]: samples to leave out altogether, because one of their rewards could not be computed."""

    notes: tuple[Mapping[str, Note], ...]
    """N of them: what each reward said of a completion beside its value, as `{reward}/{name}`."""


@dataclass(frozen=True)
class _Part:
    """What one process found out about some rows with one reward; it can be sent to the others."""

    answers: dict[int, Answer]
    failed: set[int]
    received: dict[Question, Answer]


class Rewards:
    """One or several reward functions with weights, as one callable on a batch and its completions."""

    def __init__(
        self,
        rewards: RewardFunction | str | Reward | Sequence[RewardFunction | str | Reward],
        reward_weights: Sequence[float] | None = None,
        on_failure: OnFailure | None = None,
        *,
        cache: str | None = None,
        patience: float = 600.0,
    ) -> None:
        """Resolves import paths and reads the functions' signatures.

        Args:
            rewards: Functions, callable objects, import paths of such (`rewards.squad.f1`), or any of these with
                settings.
            reward_weights: One for each reward; None weighs them all 1.
            on_failure: What a failing sample does where the reward's own settings do not say: "raise" ends the run,
                "mask" marks the sample as failed; None masks for remote rewards and raises for others. A reward that
                returns another number of values than there are rows, or something other than numbers, always raises.
            cache: An SQLite file that keeps the answers about single rows; None to keep them in memory.
            patience: Seconds that the run waits for a remote reward that answers nothing.
        """
        given = [rewards] if isinstance(rewards, (str, Reward)) or callable(rewards) else list(rewards)
        if not given:
            raise ValueError("reward: at least one reward function is needed.")
        if on_failure not in ("raise", "mask", None):
            raise ValueError(f"on_failure={on_failure!r} must be 'raise', 'mask' or null.")
        if not (math.isfinite(patience) and patience >= 0):
            raise ValueError(f"patience={patience} must be a number of seconds, 0 or more.")
        weights = (1.0,) * len(given) if reward_weights is None else tuple(float(weight) for weight in reward_weights)
        if len(weights) != len(given) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"reward_weights={list(weights)} must be a finite number for each of {len(given)} rewards."
            )
        self._memory = Memory(cache)
        self._askers = [
            Asker(
                reward,
                self._memory,
                mask=(reward.on_failure or on_failure or ("mask" if reward.remote else "raise")) == "mask",
                patience=patience,
            )
            for reward in named_rewards(given)
        ]
        self.weights: tuple[float, ...] = weights
        self._tally = Tally()

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each reward, as `rewards/{name}` in logs: its function's or class's, numbered where it repeats."""
        return tuple(asker.reward.name for asker in self._askers)

    def check(self, columns: Collection[str]) -> None:
        """Raises ValueError where a reward requires a column that the data set does not have."""
        for asker in self._askers:
            asker.reward.check(columns)

    def __call__(
        self,
        batch: Batch,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        finish_reasons: Sequence[str] | None = None,
        *,
        probe: Probe | None = None,
        masked: Collection[tuple[int, int]] = (),
    ) -> RewardValues:
        """Asks every reward about every row, on all ranks together.

        Args:
            batch: The rows, with their prompts and columns; all of them, on every rank.
            completions: The text that the model gave to each row.
            completion_ids: The same as token ids, where there are any.
            finish_reasons: Why each completion ended, ``stop`` or ``length``, where that is known.
            probe: When, and by whom; None for this process alone.
            masked: Which (place in the batch, reward) do not count, whatever a reward says of them.
        """
        probe = probe or Probe()
        rows = Rows(batch, completions, completion_ids, finish_reasons, _told(probe))
        found = probe.ranks.gather(lambda: self._asked(rows, probe, masked))
        for rank, (parts, tally) in enumerate(found):
            self._tally.add(tally)
            if rank != probe.ranks.rank:
                for part in parts:
                    self._memory.remember(part.received, lasting=False)
        return self._together([parts for parts, _ in found], len(batch), masked)

    def startup(
        self,
        batch: Batch,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]] | None = None,
        finish_reasons: Sequence[str] | None = None,
    ) -> RewardValues:
        """Asks about one real batch before the first step, on this process alone.

        Raises:
            ValueError: If the rewards have no opinion on any row.
            RuntimeError: If a reward fails for all rows, even where failures are masked.
        """
        for asker in self._askers:
            asker.announce()
        rows = Rows(batch, completions, completion_ids, finish_reasons, _told(Probe()))
        parts, _ = self._asked(rows, Probe(), (), startup=True)
        result = self._together([parts], len(batch), ())
        if bool(result.values.isnan().all()) and not bool(result.failed.any()):
            raise ValueError(
                f"The rewards ({', '.join(self.names)}) had no opinion on any of the first {len(batch)} rows: "
                "every value is None, so there is nothing to maximise."
            )
        return result

    def take_tally(self) -> Tally:
        """What there is to log since this was last called."""
        tally, self._tally = self._tally, Tally()
        return tally

    def _asked(
        self, rows: Rows, probe: Probe, masked: Collection[tuple[int, int]], *, startup: bool = False
    ) -> tuple[list[_Part], Tally]:
        """Asks about the rows that are this process's to ask about; all rewards at the same time, where they can."""
        assert len(rows.completions) == len(rows)
        tally = Tally()
        waiting = []
        for component, asker in enumerate(self._askers):
            every = range(len(rows)) if probe.ranks.rank == 0 else range(0)
            places = probe.ranks.share(len(rows)) if asker.by_row and not asker.waits else every
            if asker.by_row:
                places = [place for place in places if (place, component) not in masked]
            waiting.append(asker.begin(rows, places, tally, startup=startup))
        heard = [finish() for finish in waiting]
        parts = []
        for component, (asker, each) in enumerate(zip(self._askers, heard, strict=True)):
            unexpected = {place: e for place, e in each.failures.items() if (place, component) not in masked}
            _deal_with(asker, unexpected, rows, strict=startup and len(unexpected) == len(rows))
            parts.append(_Part(each.answers, set(unexpected), each.received))
        return parts, tally

    def _together(
        self, found: Sequence[Sequence[_Part]], size: int, masked: Collection[tuple[int, int]]
    ) -> RewardValues:
        """What all processes found out, as one.

        Args:
            found: By rank and reward.
            size: How many rows there are.
            masked: See ``__call__``.
        """
        values = torch.full((size, len(self._askers)), math.nan, dtype=torch.float64)
        failed = torch.zeros(size, dtype=torch.bool)
        notes: list[dict[str, Note]] = [{} for _ in range(size)]
        for parts in found:
            for component, (name, part) in enumerate(zip(self.names, parts, strict=True)):
                for place, answer in part.answers.items():
                    notes[place] |= {f"{name}/{what}": note for what, note in answer.notes.items()}
                    if answer.value is not None and (place, component) not in masked:
                        values[place, component] = answer.value
                failed[list(part.failed)] = True
        values[failed] = math.nan
        return RewardValues(values, failed, tuple(notes))


def _told(probe: Probe) -> dict[str, Any]:
    """What any reward may know of the run; of types that other processes know too."""
    state = SimpleNamespace(global_step=probe.step, max_steps=probe.max_steps)
    return {"trainer_state": state, "step": probe.step, "run": probe.run}


def _deal_with(asker: Asker, failures: dict[int, Exception], rows: Rows, *, strict: bool) -> None:
    """Raise the first failure, or say what will be left out.

    Args:
        asker: Who asked.
        failures: By place.
        rows: The batch.
        strict: Raise even where failures are masked.
    """
    if not failures:
        return
    if strict or not asker.mask:
        place, error = next(iter(failures.items()))
        text = failure_text(asker.reward.name, error, rows, place, len(failures) - 1)
        raise (ValueError if isinstance(error, ValueError) else RuntimeError)(text) from error
    for place, error in failures.items():
        asker.failure_log.note(error, describe_row(rows.batch, rows.completions, place))
