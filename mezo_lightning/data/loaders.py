"""The order of the rows: a pure function of (seed, batch number), so that a run can go on anywhere in its data.

Batch t of a run is rows [k·b, (k+1)·b) of the permutation of epoch t // n, where n is the number of whole batches in an
epoch, b the batch size and k = t mod n. All that a checkpoint has to keep is t. Lightning's own counters are not used:
after a stop in mid-epoch they repeat rows or end the epoch early where the loader does not keep its place.

The loaders are plain iterables, not `torch.utils.data.DataLoader`s: rows are text in memory, there is nothing for
workers to do, and Lightning leaves the sampler of an iterable alone (`use_distributed_sampler` has nothing to replace).
"""

import hashlib
from collections.abc import Callable, Iterator

import torch

from mezo_lightning.data.batch import Batch


def permutation(size: int, seed: int, purpose: str, epoch: int = 0) -> list[int]:
    """A random order of range(size): the same for the same arguments, whatever the global generators' state."""
    key = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little") >> 1)
    return torch.randperm(size, generator=generator).tolist()


class TrainLoader:
    """Shuffled whole batches, epoch after epoch; each `iter` goes on where the last one was left."""

    def __init__(self, rows: Batch, batch_size: int, seed: int, finished: Callable[[], int] | None = None) -> None:
        """Takes the rows of the split and how to cut them.

        Args:
            rows: The whole split.
            batch_size: Rows in a batch, over all processes; each of them gets whole batches, and measures its share.
            seed: Keys the order.
            finished: How many batches are finished, which an interrupted run counts by its steps; None: all that were
                handed out.
        """
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self.finished = finished
        self.batches = 0
        """Batches handed out since the run began: the number of the next one."""

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        order: tuple[int, list[int]] | None = None
        # A whole epoch's worth even from the middle of one: Lightning stops by itself after a resume, and
        # `limit_train_batches` then cuts the same sequence of batches into shorter epochs.
        for _ in range(len(self)):
            epoch, place = divmod(self.batches, len(self))
            if order is None or order[0] != epoch:
                order = epoch, permutation(len(self.rows), self.seed, "order", epoch)
            first = place * self.batch_size
            self.batches += 1
            yield self.rows.select(order[1][first : first + self.batch_size])

    def state_dict(self) -> dict[str, int]:
        """Where the run is in its data: how many batches are finished."""
        return {"batches": self.batches if self.finished is None else self.finished()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Goes on after that many batches."""
        self.batches = state_dict["batches"]


class FixedLoader:
    """All rows in their order, the last batch as short as it comes."""

    def __init__(self, rows: Batch, batch_size: int) -> None:
        """Takes the whole split and the size of a batch over all processes."""
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for first in range(0, len(self.rows), self.batch_size):
            yield self.rows.select(range(first, min(first + self.batch_size, len(self.rows))))
