"""What rewards share that compare a completion with reference texts: where these are, and that the best one counts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def best_scores(
    reward: str,
    score: Callable[[str, str], float],
    completions: Sequence[str],
    columns: Mapping[str, Any],
    references: str,
) -> list[float]:
    """The score of each completion against the reference that suits it best.

    Args:
        reward: The reward's name, for error messages.
        score: Of a completion and a reference, higher is better.
        completions: N texts.
        columns: Those of the data set, by name.
        references: The column with the reference text, or with a list of reference texts, of each row.

    Raises:
        ValueError: If there is no such column, or a row has no reference: a score of nothing would be made up.
    """
    if references not in columns:
        raise ValueError(f"{reward}(references={references!r}): no such column; there are {sorted(columns)}.")
    rows = [[row] if isinstance(row, str) else row for row in columns[references]]
    if not all(len(row) > 0 for row in rows):
        raise ValueError(f"{reward}: column {references!r} has a row without any reference.")
    pairs = zip(completions, rows, strict=True)
    return [max(score(completion, reference) for reference in row) for completion, row in pairs]
