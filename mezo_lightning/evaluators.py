"""Values of an objective at a set of points, leaving no trace in the weights.

An estimator asks for all the points of a round at once; an evaluator decides how the model takes on the weights of
each. It never knows which rule is asking, and the estimator never sees model, batch or reward.

=================  ===================================================  ==============================================
evaluator          working weights                                      extra memory
=================  ===================================================  ==============================================
``Copy``           the whole model at one point at a time, restored     one copy of the trainable weights
                   from a copy
``LeafScratch``    one leaf module at a time, perturbed into a scratch  some rows of a matrix; else the
                   buffer by forward hooks: ``leaf_scratch.py``         largest leaf module
=================  ===================================================  ==============================================

``Copy`` suits any module, and generation, where ``LeafScratch`` would make the noise again for every token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.steps import Point


@dataclass(frozen=True)
class Samples:
    """What an objective returns for a batch of N samples at the current weights."""

    values: Tensor
    """[N, C]: the components of each sample's objective, already weighted, to be minimised and summed."""
    valid: Tensor
    """bool [N, C]: False where a component has no value; a failed sample has none at all."""
    completions: tuple[str, ...] | None = None
    """What the model wrote, if it was asked to write."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, NaN where there is none: what else is worth a log."""
    notes: tuple[Mapping[str, float | str], ...] | None = None
    """N of them: what was said of each sample beside its values, by name, for people to read."""

    @staticmethod
    def of(values: Tensor) -> Samples:
        """Samples with one component that is always valid, from values [N] or a scalar."""
        values = values.reshape(-1, 1)
        return Samples(values, torch.ones_like(values, dtype=torch.bool))

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """The samples of several micro-batches as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        texts, notes = [part.completions for part in parts], [part.notes for part in parts]
        return Samples(
            torch.cat([part.values for part in parts]),
            torch.cat([part.valid for part in parts]),
            None if texts[0] is None else tuple(text for some in texts for text in some or ()),
            {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics},
            None if notes[0] is None else tuple(note for some in notes for note in some or ()),
        )


@dataclass(frozen=True)
class Preferences:
    """Which samples are better, for K pairs of points of one round."""

    values: Tensor
    """fp64 [K, N] in [-1, 1]: 1 where the pair's first point has the better sample, -1 where the second one has it, 0
    for a tie, between them for a probability; NaN where there is no opinion."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """[K, N] each, NaN where there is none: what else is worth a log."""


Compare = Callable[[Sequence[tuple[Samples, Samples]]], Preferences]
"""Compare the samples of pairs of points."""


@dataclass(frozen=True)
class Evaluation:
    """The values of one round: what was measured at each of P points, over the samples that all of them share.

    Masking is paired: a component without a value at one point is left out at all points, and a sample without any
    component left does not count at all. A failure can therefore never look like a difference between points.
    """

    points: tuple[Point, ...]
    samples: tuple[Samples, ...]
    values: Tensor
    """fp64 [P, N]; 0 where a sample does not count."""
    valid: Tensor
    """bool [N]: which samples count."""
    skip_reason: str | None
    """Why no estimate may be made from these values, if so."""
    compare: Compare | None = field(default=None, repr=False, compare=False)
    """Compares samples that have no values; None where values are compared."""
    min_valid_fraction: float = 0.0
    """With a smaller share of samples than this, no estimate may be made."""
    preferences: Tensor | None = None
    """fp64 [K, N], see ``Preferences``, once K pairs of points were compared."""

    @staticmethod
    def of(
        points: Sequence[Point],
        samples: Sequence[Samples],
        min_valid_fraction: float,
        compare: Compare | None = None,
    ) -> Evaluation:
        """Mask and check the samples that were measured at each point."""
        values = torch.stack([part.values.detach() for part in samples]).to("cpu", torch.float64)
        shared = torch.stack([part.valid for part in samples]).all(0).cpu()
        valid = shared.any(-1)
        values = values.masked_fill(~shared, 0.0).sum(-1)
        count, total = int(valid.sum()), valid.numel()
        reason = _too_few(count, total, min_valid_fraction, "samples have a value at every point")
        if reason is None and not bool(values.isfinite().all()):
            worst = points[int((~values.isfinite()).any(-1).nonzero()[0])]
            reason = f"the objective is not finite at point {worst.label}"
        return Evaluation(tuple(points), tuple(samples), values, valid, reason, compare, min_valid_fraction)

    def compared(self, pairs: Sequence[tuple[int, int]]) -> Evaluation:
        """This round with ``preferences`` between pairs of its points.

        Without a ``compare`` of its own, the sample with the smaller value is the better one. With one, a sample counts
        that has an opinion on any pair, and there are no values: the mean at each point is NaN.

        Args:
            pairs: K pairs of indices of points; all of them are asked about at once.
        """
        if self.compare is None:
            first, second = (self.values[list(places)] for places in zip(*pairs, strict=True))
            return replace(self, preferences=(second - first).sign().masked_fill(~self.valid, math.nan))
        found = self.compare([(self.samples[i], self.samples[j]) for i, j in pairs])
        assert found.values.shape == (len(pairs), self.valid.numel()), found.values.shape
        known = ~found.values.isnan()
        count, total = int(known.sum()), known.numel()
        return replace(
            self,
            samples=_with_metrics(self.samples, pairs, found),
            values=torch.full_like(self.values, math.nan),
            valid=known.any(0),
            skip_reason=_too_few(count, total, self.min_valid_fraction, "comparisons have an answer"),
            preferences=found.values,
        )

    @property
    def means(self) -> list[float]:
        """The objective at each point: the mean over the samples that count, summed exactly."""
        count = int(self.valid.sum())
        return [math.fsum(row) / count if count else math.nan for row in self.values.tolist()]

    @property
    def mean_preferences(self) -> list[float]:
        """For each pair that was compared, the mean over the samples with an opinion on it; NaN where none has one."""
        assert self.preferences is not None
        known = [[value for value in row if not math.isnan(value)] for row in self.preferences.tolist()]
        return [math.fsum(row) / len(row) if row else math.nan for row in known]

    def tie_fraction(self, pairs: Sequence[tuple[int, int]]) -> float:
        """The share of samples that count whose values at the two points of a pair are the same, or as good."""
        if not pairs or not self.valid.any():
            return math.nan
        if self.preferences is not None:
            return float((self.preferences[~self.preferences.isnan()] == 0).double().mean())
        equal = torch.stack([self.values[i, self.valid] == self.values[j, self.valid] for i, j in pairs])
        return float(equal.double().mean())

    def identical_fraction(self, pairs: Sequence[tuple[int, int]]) -> float:
        """The share of samples with the same completion at the two points of a pair; NaN where none are written."""
        texts = [part.completions for part in self.samples]
        same = [a == b for i, j in pairs for a, b in zip(texts[i] or (), texts[j] or (), strict=True)]
        return sum(same) / len(same) if same else math.nan


def _too_few(count: int, total: int, min_fraction: float, what: str) -> str | None:
    """Why no estimate may be made from so many; None where they are enough."""
    if count and count / total >= min_fraction:  # 35 / 500 is 0.07, but 0.07 * 500 is more than 35
        return None
    return f"{count} of {total} {what}" + (f", fewer than {100 * min_fraction:g}%" if min_fraction else "")


def _with_metrics(
    samples: Sequence[Samples], pairs: Sequence[tuple[int, int]], found: Preferences
) -> tuple[Samples, ...]:
    """The samples of all points, with the metrics of a comparison at the first point of each pair."""

    def at(point: int, values: Tensor) -> Tensor:
        return values[[place for place, (first, _) in enumerate(pairs) if first == point]].double().nanmean(0)

    return tuple(
        replace(part, metrics={**part.metrics, **{name: at(point, v) for name, v in found.metrics.items()}})
        for point, part in enumerate(samples)
    )


Evaluate = Callable[[Sequence[Point]], Evaluation]
"""Ask for the values of a round of points."""


class Evaluator(ABC):
    """Evaluates objectives at points; the weights are byte-equal before and after, whatever happens in between.

    Args:
        space: The trainable parameters.
        min_valid_fraction: With fewer samples than this left after masking, no estimate is made from a round.
    """

    def __init__(self, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        if not 0.0 <= min_valid_fraction <= 1.0:
            raise ValueError(f"min_valid_fraction={min_valid_fraction} must be between 0 and 1")
        self.space = space
        self.min_valid_fraction = min_valid_fraction

    @abstractmethod
    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        """Give the model the weights of each point in turn; theta again when closed or exhausted."""

    def __call__(self, objective: Callable[[], Samples | Tensor], compare: Compare | None = None) -> Evaluate:
        """Bind an objective.

        Args:
            objective: Runs the model and returns ``Samples``, or a tensor of per-sample values [N] or a scalar, to
                be minimised. It is called once a point, without gradients.
            compare: Compares samples of two points where they have no values; it runs at the weights as they are.
        """

        def measured() -> Samples:
            result = objective()
            return result if isinstance(result, Samples) else Samples.of(result)

        def evaluate(points: Sequence[Point]) -> Evaluation:
            with torch.inference_mode(), uninterrupted() as interruptible:
                samples = list(self._measure(points, measured, interruptible))
            return Evaluation.of(points, samples, self.min_valid_fraction, compare)

        return evaluate

    def _measure(
        self, points: Sequence[Point], objective: Callable[[], Samples], interruptible: AbstractContextManager[None]
    ) -> Iterator[Samples]:
        """The objective at each point; user's code runs in ``interruptible``."""
        with closing(self.visit(points)) as visits:
            for _ in visits:
                with interruptible:
                    samples = objective()
                yield samples


class Copy(Evaluator):
    """The whole model at one point at a time, restored by copying: any module, any use of its weights."""

    def __init__(self, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        self._saved: list[Tensor] | None = None

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        with torch.inference_mode(False):
            self._saved = self.space.save(self._saved)
        try:
            for point in points:
                self.space.move_to(point, self._saved)
                yield point
        finally:
            with uninterrupted():
                self.space.restore(self._saved)
