"""Rewards of what the model writes, as an objective.

Rewards are maximised and objectives minimised: the sign flips in this file and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo_lightning.completers import BoundCompleter, Completer, Completions
from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoder, Encoding
from mezo_lightning.evaluators import Samples
from mezo_lightning.generation import Generate
from mezo_lightning.objectives.base import BoundObjective, Objective, complaint, unmeasured
from mezo_lightning.objectives.divergence import Divergence, KLEstimator, check_adapter
from mezo_lightning.probes import Probe
from mezo_lightning.processes.ranks import Ranks
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.masks import RecordedMasks
from mezo_lightning.rewarding.rewards import OnFailure, Rewards, RewardValues
from mezo_lightning.rewarding.settings import Reward

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM, Pretrained


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Rewards of the model's completions, any functions at all: they are called, never differentiated."""

    # The list stands before the callable: jsonargparse cannot write the saved configuration the other way round.
    reward: str | Reward | list[str | Reward | Callable[..., Any]] | Callable[..., Any]
    """`reward(prompts, completions, **columns) -> list[float | None]`, as in TRL, or as other libraries call theirs: an
    import path (rewards.squad.f1), a class_path with init_args, a Reward with settings, or a list of them; higher is
    better"""
    reward_weights: list[float] | None = None
    """a weight for each reward; null: 1 each"""
    completer: Completer = Generate()  # noqa: RUF009  (frozen)
    """how the model answers: Generate, token by token, or ChooseOption, the likeliest option"""
    on_failure: OnFailure | None = None
    """a reward that fails ends the run (raise), or leaves its sample out of all probes of the step (mask); null: mask
    for rewards that are remote, raise for others"""
    cache: str | None = None
    """an SQLite file that keeps what rewards answered about single rows, for later runs and others at the same time;
    null: answers are forgotten with the run"""
    patience: float = 600.0
    """seconds to wait where a remote reward answers nothing any more, before the run ends"""
    masks: str | None = None
    """the folder of another run: each step leaves out the very samples that its step left out; null: none"""
    beta: float = 0.0
    """weight of a penalty for leaving the base model, as in TRL: the KL divergence on what was written, a mean over its
    tokens, is logged as kl and taken off the reward in what is maximised. It needs an adapter, which is switched off to
    find the base, and costs two more forwards a probe; 0: no penalty"""
    kl_estimator: KLEstimator = "k3"
    """of a token with r = log p_tuned - log p_base: exp(-r) - 1 + r (k3, as TRL's GRPO), never negative, or r (k1),
    which suits sampling at temperature 1 only: in greedy completions it pays for less confidence"""

    def __post_init__(self) -> None:
        """Refuse rewards that cannot be found or called, before any model is loaded."""
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta={self.beta} must be a number, 0 (no penalty) or more")
        if self.kl_estimator not in ("k1", "k3"):
            raise ValueError(f"kl_estimator={self.kl_estimator!r} must be 'k1' or 'k3'")
        self._rewards()
        self._masks()

    @property
    def autoregressive(self) -> bool:
        """As the completer is; and with a penalty, for which the model runs twice more."""
        return self.completer.autoregressive or self.beta > 0

    def check_model(self, pretrained: Pretrained) -> None:
        """Refuse a penalty without an adapter that can be switched off, and a model that does not write."""
        if pretrained.kind == "masked" and self.completer.autoregressive:
            name = type(self.completer).__name__
            raise ValueError(f"completer={name} writes, and kind='masked' fills in masks; use completer: ChooseOption")
        if self.beta and pretrained.kind == "masked":
            raise ValueError(f"beta={self.beta} weighs what is written, and kind='masked' writes nothing; set beta: 0")
        if self.beta and pretrained.virtual_tokens:
            raise ValueError(f"beta={self.beta} needs an adapter that can be switched off; use LORA, or set beta: 0")
        check_adapter(pretrained.adapter, self.beta)

    def bind(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> BoundObjective:
        """Set to work on one model."""
        encoder = encoding.bind(model, tokenizer)
        divergence = self._divergence(model, encoder) if self.beta else None
        return _BoundReward(self._rewards(), self.completer.bind(model, encoder), self._masks(), divergence)

    def _divergence(self, model: CausalLM, encoder: Encoder) -> Divergence:
        reserve = self.completer.max_new_tokens if isinstance(self.completer, Generate) else None
        return Divergence(model, encoder, beta=self.beta, estimator=self.kl_estimator, reserve=reserve)

    def _rewards(self) -> Rewards:
        return Rewards(self.reward, self.reward_weights, self.on_failure, cache=self.cache, patience=self.patience)

    def _masks(self) -> RecordedMasks | None:
        return None if self.masks is None else RecordedMasks(self.masks)


class _BoundReward(BoundObjective):
    def __init__(
        self, rewards: Rewards, completer: BoundCompleter, masks: RecordedMasks | None, divergence: Divergence | None
    ):
        self._rewards = rewards
        self._completer = completer
        self._masks = masks
        self._divergence = divergence

    def lacks(self, batch: Batch) -> str | None:
        return complaint(lambda: self._rewards.check(batch.columns))

    def check(self, batch: Batch, *, measured: bool = True) -> None:
        if measured:
            self._rewards.check(batch.columns)
        self._completer.check(batch)

    def check_ranks(self, ranks: Ranks) -> None:
        if self._divergence is not None:
            self._divergence.check_ranks(ranks)

    def startup(self, batch: Batch) -> Samples:
        said, divergence = self._completed(batch, 0, Probe())
        return self._judged(said, divergence, self._rewards.startup(batch, said.texts, said.ids, said.finish_reasons))

    def samples(self, batch: Batch, *, seed: int) -> Samples:
        return self.measure(batch, seed=seed)

    def measure(self, batch: Batch, *, seed: int, probe: Probe = Probe()) -> Samples:  # noqa: B008  (frozen)
        """All rows are completed first, and then judged at once: a reward may need to see them together."""
        said, divergence = self._completed(batch, seed, probe)
        values = self._rewards(
            *(batch, said.texts, said.ids, said.finish_reasons), probe=probe, masked=self._masked(batch, probe)
        )
        return self._judged(said, divergence, values)

    @torch.inference_mode()
    def complete(self, batch: Batch, *, seed: int) -> Samples:
        return unmeasured(self._completer.complete(batch, seed=seed).texts)

    def take_tally(self) -> Tally:
        return self._rewards.take_tally()

    @torch.inference_mode()
    def _completed(self, batch: Batch, seed: int, probe: Probe) -> tuple[Completions, Tensor]:
        """What the model answers to all rows, and the divergence of each from its base; nothing if that counts nothing.

        Each rank completes its own rows, and knows those of the others.
        """

        def mine() -> list[tuple[Completions, Tensor]]:
            return probe.each(batch, lambda part: self._written(part, seed))

        said, divergence = zip(*(part for parts in probe.ranks.gather(mine) for part in parts), strict=True)
        return Completions.concatenate(said), torch.cat(divergence)

    def _written(self, batch: Batch, seed: int) -> tuple[Completions, Tensor]:
        said = self._completer.complete(batch, seed=seed)
        return said, torch.empty(0) if self._divergence is None else self._divergence(batch.prompts, said)

    def _masked(self, batch: Batch, probe: Probe) -> set[tuple[int, int]]:
        """What another run left out of this round, as (place in the batch, component)."""
        if self._masks is None or probe.round is None:
            return set()
        masks = set(self._masks.at(probe.step, probe.round, batch.index))
        return {
            (place, component)
            for place, row in enumerate(batch.index)
            for component in range(len(self._rewards.names))
            if (row, component) in masks
        }

    def _judged(self, said: Completions, divergence: Tensor, values: RewardValues) -> Samples:
        rewards = values.values
        weighted = rewards * torch.tensor(self._rewards.weights, dtype=torch.float64)
        valid = ~rewards.isnan()
        total = weighted.nansum(-1).masked_fill(~valid.any(-1), torch.nan)
        metrics = {f"rewards/{name}": rewards[:, i] for i, name in enumerate(self._rewards.names)}
        metrics |= {"reward": total, "tokens": torch.tensor([float(len(ids)) for ids in said.ids])}
        samples = Samples(-weighted.masked_fill(~valid, 0.0), valid, said.texts, metrics, values.notes)
        return samples if self._divergence is None else self._divergence.penalised(samples, divergence)
