"""Which samples had no say in a step: kept with each step, so that another run can leave out the very same ones.

A sample counts at all points of a round or at none, see ``Evaluation``. What is left out is thus one list a round, of
pairs (row, component): the row's number in the data, and which of the rewards.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.evaluators import Evaluate, Evaluation
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.steps import Point

Masks = list[list[tuple[int, int]]]
"""One list a round, of (row, component); empty where all that there is counted in all rounds."""


class Rounds:
    """The rounds of points that an estimator asks for in one step, and what was left out of each."""

    def __init__(self) -> None:
        self.number: int | None = None
        """Of the round that is being measured, from 0; None between them."""
        self._masks: Masks = []

    def begin(self, evaluate: Evaluate, batch: Batch) -> Evaluate:
        """Begin a step: watch over a way to evaluate.

        Args:
            evaluate: Gives the values of a round of points.
            batch: The rows that they are about.
        """
        self._masks = []

        def watched(points: Sequence[Point]) -> Evaluation:
            self.number = len(self._masks)
            try:
                evaluation = evaluate(points)
            finally:
                self.number = None
            self._masks.append(_left_out(evaluation, batch))
            return evaluation

        return watched

    @property
    def masks(self) -> Masks:
        """Of the step."""
        return self._masks if any(self._masks) else []


def _left_out(evaluation: Evaluation, batch: Batch) -> list[tuple[int, int]]:
    if evaluation.compare is not None:  # samples that have no values
        return []
    counts = torch.stack([samples.valid for samples in evaluation.samples]).all(0)
    return [(batch.index[row], component) for row, component in (~counts).nonzero().tolist()]


class RecordedMasks:
    """The masks of a run that was made before.

    Args:
        folder: The run's folder.

    Raises:
        ValueError: If it holds no steps.
    """

    def __init__(self, folder: str | Path):
        self._folder = folder
        self._steps: Mapping[int, Masks] = {
            record.step: [[(row, component) for row, component in one] for one in record.masks]
            for record in RunRecords(folder).steps()
        }
        if not self._steps:
            raise ValueError(f"masks={str(folder)!r} holds no steps: give the folder of a run, with its steps.jsonl.")

    def at(self, step: int, number: int, rows: Sequence[int]) -> Collection[tuple[int, int]]:
        """What to leave out of a round, as (row, component).

        Args:
            step: How many steps were made before.
            number: Which round of the step.
            rows: The rows of the batch.

        Raises:
            ValueError: If the other run did not make this step, or not with these rows.
        """
        if step + 1 not in self._steps:
            raise ValueError(f"masks={str(self._folder)!r} has no step {step + 1}: that run was shorter than this one.")
        rounds = self._steps[step + 1]
        masks = rounds[number] if number < len(rounds) else []
        strange = sorted({row for row, _ in masks}.difference(rows))
        if strange:
            raise ValueError(
                f"masks={str(self._folder)!r} leaves out rows {strange} at step {step + 1}, which are not in this "
                "run's batch: the two runs need the same data, batch size and seed."
            )
        return masks
