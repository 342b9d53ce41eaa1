"""Where parameters lie in the flat vector: what directions with structure have to know of the parameter table."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo_lightning.parameters import ParameterInfo


BLOCKS = r"\b(?:layers?|blocks?|h)\.\d+"
"""Finds the block that a parameter of a usual model belongs to, in its name."""


def check_pattern(what: str, pattern: str) -> None:
    """Refuse what is no regular expression.

    Args:
        what: The sampler and option that it is for.
        pattern: What that was set to.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{what}: {pattern!r} is no regular expression: {error}") from error


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
