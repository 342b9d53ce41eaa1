"""Sharing rows out, and what one process of its own does."""

import pytest
import torch

from mezo_lightning.evaluators import Samples
from mezo_lightning.processes.ranks import Alone, Ranks


class Seat(Alone):
    """One of several ranks, which this test does not connect."""

    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [1, 2, 6, 7, 16, 101])
def test_shares_are_contiguous_even_and_complete(size: int, world_size: int):
    ranks: list[Ranks] = [Seat(rank, world_size) for rank in range(world_size)]
    shares = [rank.share(size) for rank in ranks]
    assert [row for share in shares for row in share] == list(range(size))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_results_and_errors_come_as_they_are():
    alone = Alone()
    assert alone.gather(lambda: 3) == [3]
    assert alone.together(lambda: [3]) == [3]
    samples = Samples.of(torch.ones(2))
    assert alone.collect(lambda: samples, texts=False) is samples
    with pytest.raises(ZeroDivisionError):
        alone.together(lambda: 1 / 0)
