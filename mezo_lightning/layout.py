"""Where parameters lie in the flat vector: what directions with structure have to know of the parameter table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo


class Layout:
    """Finds the parameters that positions belong to.

    Args:
        table: Every parameter of the unsharded model, in the order of positions.
    """

    def __init__(self, table: Sequence[ParameterInfo]):
        self.table = tuple(table)
        self._starts = [info.start for info in table]

    def at(self, position: int) -> ParameterInfo:
        """The parameter that a position belongs to."""
        return self.table[bisect_right(self._starts, position) - 1]

    def runs(self, start: int, stop: int) -> Iterator[tuple[ParameterInfo, int, int]]:
        """The parameters that positions [start, stop) run through, and from where to where in each."""
        while start < stop:
            info = self.at(start)
            end = min(stop, info.start + info.numel)
            yield info, start - info.start, end - info.start
            start = end
