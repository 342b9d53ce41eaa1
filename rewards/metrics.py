"""Any text metric of torchmetrics as a reward, one score a row.

A metric of one row is not always what its authors had in mind: BLEU of a short sentence is mostly 0, which is a flat
reward; CHRF or ROUGE move. A metric where lower is better (error rates, edit distances) changes sign here, because a
reward is maximised. Where a row has several references, the best counts.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from rewards._references import best_scores


@dataclass(frozen=True, eq=False)
class TorchMetric:
    """A torchmetrics text metric between the completion and a column of references."""

    metric: Any
    """The metric's import path, such as torchmetrics.text.CHRFScore, or (from Python) an instance of it."""

    references: str
    """The column with the reference text, or with a list of reference texts, of each row."""

    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the metric, where it is given by import path."""

    key: str | None = None
    """Which score to take of a metric that computes several, such as rougeL_fmeasure of ROUGEScore."""

    per_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.options and not isinstance(self.metric, str):
            raise ValueError("TorchMetric(options=...) goes with an import path: give the options to the instance.")
        if self._metric.higher_is_better is None:
            raise ValueError(f"TorchMetric(metric={self.metric!r}) does not say whether higher or lower is better.")

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns without which this reward cannot be computed."""
        return (self.references,)

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """One score for each completion, higher is better."""
        return best_scores("TorchMetric", self._score, completions, columns, self.references)

    def _score(self, completion: str, target: str) -> float:
        self._metric.reset()
        self._metric.update([completion], [target])
        value = self._metric.compute()
        self._metric.reset()
        if isinstance(value, dict):
            if self.key not in value:
                raise ValueError(f"TorchMetric(key={self.key!r}): the metric computes {sorted(value)}; name one.")
            value = value[self.key]
        return float(value) if self._metric.higher_is_better else -float(value)

    @cached_property
    def _metric(self) -> Any:
        import torchmetrics

        metric = _build(self.metric, self.options) if isinstance(self.metric, str) else self.metric
        if not isinstance(metric, torchmetrics.Metric):
            raise TypeError(f"TorchMetric(metric={self.metric!r}) is no torchmetrics.Metric.")
        return metric


def _build(path: str, options: dict[str, Any]) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ValueError(f"TorchMetric(metric={path!r}): no such class; try torchmetrics.text.CHRFScore.") from error
    return found(**options)
