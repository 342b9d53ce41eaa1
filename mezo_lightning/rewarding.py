"""Reward functions made one: weights, and what becomes of a reward that fails.

A failure never becomes a number (a 0.0 on one probe only would look like a slope): it ends the run, or it leaves out
the sample. None is no failure, it leaves out one component of a sample, as in TRL.
"""

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mezo_lightning.batch import Batch
from mezo_lightning.reward_functions import (
    CallFailed,
    NamedReward,
    RewardFunction,
    describe_row,
    imported,
    unique_names,
)

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class RewardValues:
    """What the rewards said of N completions."""

    values: Tensor
    """float64 [N, C]: a column for each reward, not weighted; NaN where it had no opinion or the sample failed."""

    failed: Tensor
    """bool [N]: samples to leave out altogether, because one of their rewards could not be computed."""


class Rewards:
    """One or several reward functions with weights, as one callable on a batch and its completions."""

    def __init__(
        self,
        rewards: RewardFunction | str | Sequence[RewardFunction | str],
        reward_weights: Sequence[float] | None = None,
        on_error: Literal["raise", "mask"] = "raise",
    ) -> None:
        """Resolves import paths and reads the functions' signatures.

        Args:
            rewards: Functions, callable objects, or import paths of such, `rewards.squad.f1`.
            reward_weights: One for each reward; None weighs them all 1.
            on_error: What a failing sample does: "raise" ends the run, "mask" marks the sample as failed. A reward that
                returns another number of values than there are rows, or something other than numbers, always raises.
        """
        given = [rewards] if isinstance(rewards, str) or callable(rewards) else list(rewards)
        if not given:
            raise ValueError("reward: at least one reward function is needed.")
        if on_error not in ("raise", "mask"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'mask'.")
        weights = (1.0,) * len(given) if reward_weights is None else tuple(float(weight) for weight in reward_weights)
        if len(weights) != len(given) or not all(math.isfinite(weight) for weight in weights):
            raise ValueError(
                f"reward_weights={list(weights)} must be a finite number for each of {len(given)} rewards."
            )
        functions = [imported(reward) if isinstance(reward, str) else reward for reward in given]
        self._rewards = [NamedReward(*pair) for pair in zip(unique_names(functions), functions, strict=True)]
        self.weights: tuple[float, ...] = weights
        self.on_error = on_error
        self._warned: set[str] = set()

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each reward, as `rewards/{name}` in logs: its function's or class's, numbered where it repeats."""
        return tuple(reward.name for reward in self._rewards)

    def check(self, columns: Collection[str]) -> None:
        """Raises ValueError where a reward requires a column that the data set does not have."""
        for reward in self._rewards:
            reward.check(columns)

    def __call__(
        self, batch: Batch, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> RewardValues:
        """Asks every reward about every row.

        Args:
            batch: The rows, with their prompts and columns.
            completions: The text that the model gave to each row.
            completion_ids: The same as token ids, where there are any.
        """
        return self._ask(batch, completions, completion_ids, mask=self.on_error == "mask")

    def startup(
        self, batch: Batch, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None = None
    ) -> RewardValues:
        """Asks about one real batch before the first step; anything wrong with a reward raises, even under "mask"."""
        result = self._ask(batch, completions, completion_ids, mask=False)
        if bool(result.values.isnan().all()):
            raise ValueError(
                f"The rewards ({', '.join(self.names)}) had no opinion on any of the first {len(batch)} rows: "
                "every value is None, so there is nothing to maximise."
            )
        return result

    def _ask(
        self, batch: Batch, completions: Sequence[str], completion_ids: Sequence[Sequence[int]] | None, mask: bool
    ) -> RewardValues:
        assert len(completions) == len(batch)
        values = torch.full((len(batch), len(self._rewards)), math.nan, dtype=torch.float64)
        failed = torch.zeros(len(batch), dtype=torch.bool)
        for component, reward in enumerate(self._rewards):
            try:
                answers = reward.ask(batch, completions, completion_ids)
            except CallFailed as error:
                if not mask:
                    raise RuntimeError(str(error)) from error.__cause__  # the user needs the traceback of his code
                self._warn(reward.name, str(error))
                failed[:] = True
                continue
            for row, answer in enumerate(answers):
                if answer is None:
                    continue
                if math.isfinite(answer):
                    values[row, component] = answer
                    continue
                message = f"Reward {reward.name} returned {answer} for {describe_row(batch, completions, row)}."
                if not mask:
                    raise ValueError(f"{message} A row without a value must be None; or set on_error to mask.")
                self._warn(reward.name, message)
                failed[row] = True
        values[failed] = math.nan
        return RewardValues(values, failed)

    def _warn(self, name: str, message: str) -> None:
        # Once a reward: a judge that is down would repeat itself at every probe of every step.
        if name not in self._warned:
            self._warned.add(name)
            _LOG.warning("%s Such samples are left out; further failures of %s are not shown.", message, name)
