"""Comparisons as an objective: which of two completions is better, in the eyes of a person, a judge or a model.

A step needs no scores. It asks which of two probes wrote the better completion of each prompt, and the estimator
``Comparison``, or ``Ranking`` for several probes, makes an estimate of the votes. An oracle (``oracles.py``) is asked
once for all pairs of a step, at the weights as they are, and never about two completions that are the same: those are
ties.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mezo_lightning.completers import BoundCompleter, Completer
from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import Estimator
from mezo_lightning.evaluators import Compare, Preferences, Samples
from mezo_lightning.generation import Generate
from mezo_lightning.models.quantised import warn_of_small_epsilon
from mezo_lightning.objectives.base import BoundObjective, Objective, complaint, unmeasured
from mezo_lightning.probes import Probe
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.oracles import Oracle
from mezo_lightning.rewarding.rewards import OnFailure
from mezo_lightning.rewarding.settings import Reward
from mezo_lightning.samplers import derive_seed
from mezo_lightning.startup import fp32_by_default

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM, Pretrained

log = logging.getLogger(__name__)

_ORDER = 2  # what a step's seed is for, beside those of module.py


@dataclass(frozen=True)
class PreferenceObjective(Objective):
    """Which of two completions is better, in the eyes of an oracle; for the estimators ``Comparison``, ``Ranking``."""

    oracle: str | Reward | Callable[..., Any]
    """`oracle(prompts, first, second, **columns) -> list[float | None]`: an import path, a class_path with init_args,
    or a Reward with settings; 1: the first is better, -1: the second, 0: a tie, 2p - 1 for a probability, None: no
    opinion"""
    completer: Completer = Generate()  # noqa: RUF009  (frozen)
    """how the model answers: Generate, token by token, or ChooseOption, the likeliest option"""
    on_failure: OnFailure | None = None
    """a pair that fails ends the run (raise), or leaves its sample out of the step (mask); null: mask for an oracle
    that is remote, raise for others"""
    cache: str | None = None
    """an SQLite file that keeps what an oracle answered about single pairs, for later runs; null: answers are forgotten
    with the run. A person's votes have a store of their own"""
    patience: float = 600.0
    """seconds to wait where a remote oracle answers nothing any more, before the run ends"""
    win_rate: bool = False
    """at validations, ask the oracle to compare what the model writes with what it wrote before the first step, one
    question for each row that has changed, and log the share that is better now, ties as half: 0.5 before the first
    step; else validation only writes"""

    def __post_init__(self) -> None:
        """Refuse oracles that cannot be found or called, before any model is loaded."""
        self._oracle()

    @property
    def autoregressive(self) -> bool:
        """As the completer is."""
        return self.completer.autoregressive

    def bind(self, model: CausalLM, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> BoundPreference:
        """Set to work on one model."""
        completer = self.completer.bind(model, encoding.bind(model, tokenizer))
        return BoundPreference(self._oracle(), completer, win_rate=self.win_rate)

    def _oracle(self) -> Oracle:
        return Oracle(self.oracle, self.on_failure, cache=self.cache, patience=self.patience)


def check_estimator(estimator: Estimator, objective: Objective, pretrained: Pretrained) -> None:
    """Refuse an estimator that needs values, where there are only comparisons; warn of one that hardly moves its model.

    Args:
        estimator: Makes estimates of the objective.
        objective: What is minimised, or compared.
        pretrained: What is tuned.

    Raises:
        ValueError: If they do not go together.
    """
    if isinstance(objective, PreferenceObjective) and estimator.needs_values:
        raise ValueError(
            f"estimator={type(estimator).__name__} needs a value at each point, and a PreferenceObjective only "
            "compares points: use `estimator: Comparison` or Ranking, or a RewardObjective where there are scores"
        )
    if pretrained.quantization is not None:
        warn_of_small_epsilon(estimator.epsilon)


class BoundPreference(BoundObjective):
    """Completions of one model, and an oracle that compares them.

    Args:
        oracle: Compares.
        completer: Completes.
        win_rate: Whether to compare at validations too.
    """

    def __init__(self, oracle: Oracle, completer: BoundCompleter, *, win_rate: bool = False):
        self._oracle = oracle
        self._completer = completer
        self._tally = Tally()
        self._win_rate = win_rate
        self._before: dict[tuple[int, str], str] = {}
        """What the model wrote before the first step, by row and prompt."""
        self._warned = False

    def lacks(self, batch: Batch) -> str | None:
        return complaint(lambda: self._oracle.check(batch.columns))

    def check(self, batch: Batch, *, measured: bool = True) -> None:
        if measured:
            self._oracle.check(batch.columns)
        self._completer.check(batch)

    def startup(self, batch: Batch) -> Samples:
        """Only write: nobody should be asked before the run, and the first answers are looked at closely anyway."""
        return self.complete(batch, seed=0)

    def samples(self, batch: Batch, *, seed: int) -> Samples:
        return self.complete(batch, seed=seed)

    def measure(self, batch: Batch, *, seed: int, probe: Probe = Probe()) -> Samples:  # noqa: B008  (frozen)
        """Write; at a validation, compare with what was written before the first step, if that is asked for."""
        samples = super().measure(batch, seed=seed, probe=probe)
        if not self._win_rate or probe.round is not None:
            return samples
        rows = list(zip(batch.index, batch.prompts, strict=True))
        if probe.first:
            self._before |= dict(zip(rows, samples.completions or (), strict=True))
        rate = self._rate(batch, rows, samples.completions or (), seed, probe)
        known = (~rate.isnan()).double()
        return replace(samples, metrics={**samples.metrics, "win_rate": rate, "win_rate/known": known})

    def _rate(
        self, batch: Batch, rows: Sequence[tuple[int, str]], texts: Sequence[str], seed: int, probe: Probe
    ) -> Tensor:
        """Fp64 [N]: 1 where a text is better than before, 0 where it is worse; NaN where nobody knows."""
        known = [place for place, row in enumerate(rows) if row in self._before]
        if len(known) < len(rows):
            self._warn(len(known), len(rows))
        rate = torch.full((len(rows),), torch.nan, dtype=torch.float64)
        if known:
            now, before = zip(*((texts[place], self._before[rows[place]]) for place in known), strict=True)
            order, pairs = derive_seed(seed, probe.step, _ORDER), [(unmeasured(now), unmeasured(before))]
            [rate[known]] = (1 + self.compare(batch.select(known), pairs, seed=order, probe=probe).values) / 2
        return rate

    def predict(self, batch: Batch, *, seed: int, probe: Probe = Probe()) -> Samples:  # noqa: B008  (frozen)
        """Only write: a prediction has nothing to be compared with."""
        return probe.collect(batch, lambda part: self.complete(part, seed=seed))

    def _warn(self, known: int, rows: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "%d of the %d rows of a batch have a win rate: what the model wrote to the others before the first "
                "step of its run is not known. trainer.num_sanity_val_steps=-1 has it written down for all rows, and a "
                "run's checkpoints hold it (ckpt_path)",
                *(known, rows),
            )

    def state_dict(self) -> dict[str, Any]:
        """What was written before the first step."""
        return {"before": self._before} if self._before else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = dict(state.get("before", {}))

    @torch.inference_mode()
    def complete(self, batch: Batch, *, seed: int) -> Samples:
        return unmeasured(self._completer.complete(batch, seed=seed).texts)

    def take_tally(self) -> Tally:
        tally, self._tally = self._tally, Tally()
        return tally

    def compare(
        self,
        batch: Batch,
        pairs: Sequence[tuple[Samples, Samples]],
        *,
        seed: int,
        probe: Probe = Probe(),  # noqa: B008  (frozen)
    ) -> Preferences:
        """Ask which completions are better, by all ranks together.

        Rank zero asks, so that limits on requests hold for the whole job and no pair is asked about twice; all ranks
        know the answers. They may wait for hours: see ``ranks.py``. Which of the two completions comes first is drawn
        for each question, and the answer turned round accordingly, so that an oracle that likes the first place better
        adds noise but no direction. A failure leaves its sample out of all pairs; no opinion leaves it out of one.

        Args:
            batch: The N rows.
            pairs: The samples of K pairs of points, with their completions.
            seed: Decides on the order of the two.
            probe: When, and by whom.
        """
        questions = _questions(batch, pairs, seed)

        def ask() -> tuple[list[Any], Tally]:
            tally = Tally()
            with fp32_by_default():
                return (self._ask(batch, questions, probe, tally) if probe.ranks.rank == 0 else []), tally

        answers, tally = probe.ranks.gather(ask)[0]
        self._tally.add(tally)
        return _preferences(questions, answers, (len(pairs), len(batch)))

    def _ask(self, batch: Batch, questions: Sequence[_Question], probe: Probe, tally: Tally) -> list[_Answer]:
        if not questions:
            return []
        rows = batch.select(question.row for question in questions)
        first, second = zip(*(question.texts for question in questions), strict=True)
        answers = self._oracle.ask(rows, first, second, probe, tally)
        return ["failed" if isinstance(answer, Exception) else answer for answer in answers]


def comparison(objective: BoundObjective, batch: Batch, seed: int, probe: Probe) -> Compare | None:
    """How to compare completions of a batch; None for an objective whose samples have values.

    Args:
        objective: At work on the model.
        batch: The rows.
        seed: The run's.
        probe: See ``BoundPreference.compare``.
    """
    if not isinstance(objective, BoundPreference):
        return None
    return partial(objective.compare, batch, seed=derive_seed(seed, probe.step, _ORDER), probe=probe)


@dataclass(frozen=True)
class _Question:
    """Two completions of a row, in the order in which they are shown."""

    pair: int
    row: int
    texts: tuple[str, str]
    sign: float
    """-1 where the order was turned round."""


def _questions(batch: Batch, pairs: Sequence[tuple[Samples, Samples]], seed: int) -> list[_Question]:
    questions = []
    for pair, (first, second) in enumerate(pairs):
        texts = zip(first.completions or (), second.completions or (), strict=True)
        for row, (index, (one, other)) in enumerate(zip(batch.index, texts, strict=True)):
            if one == other:
                continue
            turned = derive_seed(seed, pair, index) & 1
            questions.append(_Question(pair, row, (other, one) if turned else (one, other), -1.0 if turned else 1.0))
    return questions


_Answer = float | Literal["failed"] | None  # exceptions do not always travel between processes


def _preferences(questions: Sequence[_Question], answers: Sequence[_Answer], shape: tuple[int, int]) -> Preferences:
    """Answers where they belong; what was not asked about is a tie."""
    values, asked, failed = torch.zeros(3, *shape, dtype=torch.float64)
    for question, answer in zip(questions, answers, strict=True):
        place = (question.pair, question.row)
        asked[place] = 1.0
        failed[place] = answer == "failed"
        values[place] = torch.nan if answer is None or answer == "failed" else question.sign * answer
    values[:, failed.any(0)] = torch.nan
    return Preferences(values, {"preference": values, "preference/asked": asked, "preference/failed": failed})
