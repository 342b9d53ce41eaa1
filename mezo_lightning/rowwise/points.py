"""A direction for each row of a batch: the points that ask for it, and how it is known which rows a model runs on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import Point, round_coefficient


class RowPoint(Point):
    """Another place for each row of a batch: row b is evaluated at ``theta + coefficient * z(row_seed(seed, b))``.

    Args:
        seed: Decides the directions of all rows.
        coefficient: How far along them; kept to 12 significant bits.
        label: The point's name in logs.
    """

    seed: int
    coefficient: float

    def __init__(self, seed: int, coefficient: float, label: str):
        values = {"seed": seed, "coefficient": round_coefficient(coefficient), "label": label}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def terms(self) -> tuple[tuple[int, float], ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Asked for by evaluators that give all rows the same weights: they cannot serve this point.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "the estimator asks for a direction for each row of the batch (GRZO), and this evaluator gives all rows "
            "the same weights: give the optimizer `sampler: Flipout` and leave the weights whole (strategy auto or "
            "replicated; in plain PyTorch, the evaluator Rowwise), or take another estimator"
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowPoint) and (self.seed, self.coefficient) == (other.seed, other.coefficient)

    def __hash__(self) -> int:
        return hash((self.seed, self.coefficient))

    def __repr__(self) -> str:
        return f"RowPoint(seed={self.seed}, coefficient={self.coefficient}, label={self.label!r})"


def row_seed(seed: int, row: int) -> int:
    """The seed of a row's direction.

    Args:
        seed: Of all rows.
        row: The row's place in the batch, whichever process or micro-batch it is in.
    """
    return derive_seed(seed, row)


_rows: ContextVar[tuple[int, ...] | None] = ContextVar("rows", default=None)


def rows_that_run() -> tuple[int, ...] | None:
    """The place in the step's batch of each row that the model runs on now; None where nobody has said."""
    return _rows.get()


@contextmanager
def running(rows: Sequence[int]) -> Iterator[None]:
    """Say which rows the model runs on, for evaluators that give each row weights of its own.

    Nested, an inner one counts within the rows of the outer one: those of a micro-batch, say.

    Args:
        rows: Their places; one for each row of the model's input, and the same one for all that belong together.
    """
    outer = _rows.get()
    token = _rows.set(tuple(rows) if outer is None else tuple(outer[row] for row in rows))
    try:
        yield
    finally:
        _rows.reset(token)
