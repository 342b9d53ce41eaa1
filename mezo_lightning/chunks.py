"""What is worked on at once of the slices that a process holds: runs of positions that stay in cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo_lightning.parameters import Slice


@dataclass(frozen=True)
class Piece:
    """Elements [begin, end) of slice number ``slice``, at [at, at + end - begin) of their chunk."""

    slice: int
    group: int
    begin: int
    end: int
    at: int

    @property
    def span(self) -> slice:
        """Where the piece lies in its chunk."""
        return slice(self.at, self.at + self.end - self.begin)


@dataclass(frozen=True)
class Chunk:
    """A run of positions without a gap, as much as is worked on at once."""

    start: int
    numel: int
    pieces: tuple[Piece, ...]

    def spans(self) -> Iterator[tuple[int, slice]]:
        """Parameter groups and the widest spans of the chunk that belong to each."""
        for group, run in groupby(self.pieces, key=lambda piece: piece.group):
            pieces = list(run)
            yield group, slice(pieces[0].span.start, pieces[-1].span.stop)


def plan(slices: Sequence[Slice], limit: int) -> Iterator[Chunk]:
    """Cut the slices into chunks of at most ``limit`` positions without gaps."""
    pieces: list[Piece] = []
    start = stop = 0
    for number, piece in enumerate(slices):
        begin = 0
        while begin < len(piece):
            position = piece.start + begin
            if pieces and (position != stop or stop - start == limit):
                yield Chunk(start, stop - start, tuple(pieces))
                pieces = []
            if not pieces:
                start = stop = position
            end = min(len(piece), begin + limit - (stop - start))
            pieces.append(Piece(number, piece.info.group, begin, end, stop - start))
            stop += end - begin
            begin = end
    if pieces:
        yield Chunk(start, stop - start, tuple(pieces))
