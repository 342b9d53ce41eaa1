"""ROUGE (Lin 2004) by Google's ``rouge-score``, one score a row, the best over its references.

Nothing is downloaded: ``rougeLsum`` takes lines as sentences (put a newline after each), where NLTK could cut them.
``rouge-score`` before 0.1 is other code under the same name, and pip may pick it where it cannot build 0.1.2: refused.
"""

import importlib.metadata
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from rewards._references import best_scores


@dataclass(frozen=True)
class Rouge:
    """ROUGE between the completion and a column of references."""

    kind: str = "rougeL"
    """Which ROUGE: rouge1 to rouge9 (n-grams), rougeL (longest common subsequence) or rougeLsum (of each line)."""

    references: str = "summary"
    """The column with the reference text, or with a list of reference texts, of each row."""

    measure: Literal["fmeasure", "precision", "recall"] = "fmeasure"
    """What to return of the score: fmeasure (ROUGE as usually reported), precision or recall."""

    stemmer: bool = True
    """Compare word stems (Porter) instead of words, as published scores do."""

    per_sample: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not re.fullmatch(r"rouge([1-9]|L|Lsum)", self.kind):
            raise ValueError(f"Rouge(kind={self.kind!r}): use rouge1 to rouge9, rougeL or rougeLsum.")
        if self.measure not in ("fmeasure", "precision", "recall"):
            raise ValueError(f"Rouge(measure={self.measure!r}): use fmeasure, precision or recall.")
        _require_rouge_score()

    @property
    def required_columns(self) -> tuple[str, ...]:
        """The columns without which this reward cannot be computed."""
        return (self.references,)

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        """One score in [0, 1] for each completion."""
        return best_scores("Rouge", self._score, completions, columns, self.references)

    def _score(self, completion: str, reference: str) -> float:
        score = self._scorer.score(reference, completion)[self.kind]
        return {"fmeasure": score.fmeasure, "precision": score.precision, "recall": score.recall}[self.measure]

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self.kind], use_stemmer=self.stemmer)


def _require_rouge_score() -> None:
    try:
        version = importlib.metadata.version("rouge-score")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version == "none" or version.startswith("0.0."):
        raise ValueError(f"Rouge needs rouge-score 0.1.2, installed is {version}: pip install 'rouge-score>=0.1.2'.")
