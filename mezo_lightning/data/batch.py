"""Rows of text before any tokenizer has seen them: what a data module yields and an objective takes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


# Not frozen, though nobody writes to it: Lightning's `bf16-true` and `16-true` plug-ins rebuild every dataclass that
# comes out of a loader field by field, and raise on a frozen one.
@dataclass
class Batch:
    """Rows of text, not yet tokenised; the unit that the data module yields, whatever the model."""

    index: tuple[int, ...]
    """Row number in its split: the sample's identity."""

    prompts: tuple[str, ...]
    """The text to continue."""

    targets: tuple[str, ...] | None
    """The text to continue with (teacher forcing)."""

    options: tuple[tuple[str, ...], ...] | None
    """The candidate continuations of each row."""

    answers: tuple[int, ...] | None
    """Which of its options is right, for each row."""

    columns: Mapping[str, tuple[Any, ...]]
    """Every column of the data set, for rewards; and `target`, the right continuation, where there is one."""

    def __post_init__(self) -> None:
        parts = [self.prompts, self.targets, self.options, self.answers, *self.columns.values()]
        assert all(part is None or len(part) == len(self.index) for part in parts), "a Batch's parts differ in length"

    def __len__(self) -> int:
        return len(self.index)

    def select(self, rows: Iterable[int]) -> "Batch":
        """The rows at these places (not: with these indices), in this order."""
        places = list(rows)

        def take(values: Any) -> Any:
            return None if values is None else tuple(values[place] for place in places)

        columns = {name: take(values) for name, values in self.columns.items()}
        return Batch(
            take(self.index), take(self.prompts), take(self.targets), take(self.options), take(self.answers), columns
        )

    def split(self, size: int | None) -> list["Batch"]:
        """Contiguous micro-batches of at most `size` rows; None leaves the batch whole."""
        if size is None or size >= len(self):
            return [self]
        if size < 1:
            raise ValueError(
                f"micro_batch_size={size}: at least one row is needed; None takes the whole batch at once."
            )
        return [self.select(range(start, min(start + size, len(self)))) for start in range(0, len(self), size)]
