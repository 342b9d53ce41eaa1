"""Who measures a batch, and when: what an objective has to know of the run around it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from mezo_lightning.data.batch import Batch
from mezo_lightning.evaluators import Samples
from mezo_lightning.processes.ranks import Alone, Ranks
from mezo_lightning.rowwise.points import running

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """One evaluation of the objective on one batch, by all ranks together; by default, by this process alone."""

    step: int = 0
    """How many steps the run has made."""
    max_steps: int = -1
    """How many it will make; -1 where there is no limit."""
    run: str = ""
    """The name of the run: of its folder."""
    round: int | None = None
    """Which of the step's rounds of points this belongs to, from 0; None outside of training."""
    ranks: Ranks = field(default_factory=Alone)
    """The processes of the job; each takes a share of the rows."""
    micro_batch_size: int | None = None
    """How many rows go through the model at once; None for all."""
    texts: bool = True
    """Whether all ranks have to know the completions; else a hash of each will do."""
    first: bool = False
    """Whether this is the validation before the first step: Lightning's sanity check."""

    def each(self, batch: Batch, run: Callable[[Batch], T]) -> list[T]:
        """Run the model on this rank's rows, a micro-batch at a time, each with its place in the batch declared.

        Args:
            batch: All rows.
            run: Runs the model on a micro-batch.
        """
        mine, results = self.ranks.share(len(batch)), []
        for part in batch.select(mine).split(self.micro_batch_size) if len(mine) else []:
            places, mine = mine[: len(part)], mine[len(part) :]
            with running(places):
                results.append(run(part))
        return results

    def collect(self, batch: Batch, measure: Callable[[Batch], Samples]) -> Samples:
        """Measure a batch, each rank its rows.

        Args:
            batch: All rows.
            measure: Measures a micro-batch by the model.
        """

        def measured() -> Samples | None:
            samples = self.each(batch, measure)
            return Samples.concatenate(samples) if samples else None

        return self.ranks.collect(measured, texts=self.texts)
