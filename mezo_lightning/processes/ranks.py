"""What the processes of a job tell one another: the values of their samples, and that something went wrong.

Every rank measures its own rows of a batch, and all of them then know all values, in the order of the samples. That is
the only traffic a zeroth-order step adds. Whatever an action raises on one rank is raised on all, because ranks always
exchange how it went before any of them goes on; ``watchdog.py`` sees to the ranks that cannot be reached any more.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from mezo_lightning.evaluators import Samples

T = TypeVar("T")
_FOREVER = timedelta(days=30)  # a rank may wait for a person's judgement; for dead ranks there is the watchdog


class RankError(RuntimeError):
    """Another rank failed; the message says which and why."""


class Ranks(ABC):
    """The processes of a job, seen from one of them."""

    rank: int
    """This process, from 0."""
    world_size: int
    """How many there are."""

    @abstractmethod
    def gather(self, action: Callable[[], T]) -> list[T]:
        """Run an action on every rank, and return all results in the order of the ranks.

        Raises:
            RankError: If the action raised on another rank; what it raised on this one is raised as it is.
        """

    def together(self, action: Callable[[], T]) -> T:
        """Run an action on every rank, and return this rank's own result once it went well on all of them."""
        results: list[T] = []
        self.gather(lambda: results.append(action()))  # results may be such that they cannot travel
        return results[0]

    def share(self, size: int) -> range:
        """The contiguous block of a batch of ``size`` rows that this rank takes; it may be empty."""
        return range(size * self.rank // self.world_size, size * (self.rank + 1) // self.world_size)

    @abstractmethod
    def collect(self, measure: Callable[[], Samples | None], *, texts: bool) -> Samples:
        """The samples of all ranks as those of one batch.

        Args:
            measure: Measures this rank's rows; None where it has none.
            texts: Whether completions travel as they are; else a hash of each, which is enough to compare them.
        """


class Alone(Ranks):
    """A job of one process."""

    rank = 0
    world_size = 1

    def gather(self, action: Callable[[], T]) -> list[T]:
        return [action()]

    def collect(self, measure: Callable[[], Samples | None], *, texts: bool) -> Samples:
        del texts
        samples = measure()
        assert samples is not None
        return samples


class Group(Ranks):
    """The processes of ``torch.distributed``, over a channel of its own: objects on the CPU, whatever the model uses.

    Args:
        rank: This process.
        world_size: How many there are.
    """

    def __init__(self, rank: int, world_size: int):
        self.rank = rank
        self.world_size = world_size
        self.group: Any = dist.new_group(backend="gloo", timeout=_FOREVER)
        self._told: BaseException | None = None

    def gather(self, action: Callable[[], T]) -> list[T]:
        result, error = None, None
        try:
            result = action()
        except RankError:
            raise  # which all ranks know of
        except Exception as raised:
            if raised is self._told or self.out_of_step:
                raise
            error = raised
        self.wait_for_others()
        failures = self._exchange((result, None if error is None else f"{type(error).__name__}: {error}"))
        if error is not None:
            self._told = error
            raise error
        for rank, (_, failure) in enumerate(failures):
            if failure is not None:
                raise RankError(f"rank {rank} of {self.world_size} failed: {failure}")
        return [result for result, _ in failures]

    def collect(self, measure: Callable[[], Samples | None], *, texts: bool) -> Samples:
        parts = [part for part in self.gather(lambda: _portable(measure(), texts)) if part is not None]
        assert parts, "a batch has at least one row"
        return Samples.concatenate(parts)

    @property
    def out_of_step(self) -> bool:
        """Whether an error has left this rank where the others cannot meet it; they have to be ended."""
        return False

    def wait_for_others(self) -> None:
        """Take part in whatever the ranks that still run the action need of this one."""

    def _exchange(self, value: Any) -> list[Any]:
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def _portable(samples: Samples | None, texts: bool) -> Samples | None:
    if samples is None:
        return None
    completions = samples.completions
    if completions is not None and not texts:
        completions = tuple(hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in completions)
    return replace(
        samples,
        values=samples.values.cpu(),
        valid=samples.valid.cpu(),
        completions=completions,
        metrics={name: values.cpu() for name, values in samples.metrics.items()},
    )


class Lockstep(Group):
    """Ranks whose forwards contain collectives, as they do where weights are gathered layer by layer.

    All ranks must then run the same number of forwards. Those that are done with theirs, because they have fewer rows,
    or their completions ended early, or their reward failed, run forwards on a dummy until all of them are done.

    Args:
        rank: This process.
        world_size: How many there are.
        model: Its forwards are kept in step; its ``forward`` must take ``input_ids``.
    """

    def __init__(self, rank: int, world_size: int, model: torch.nn.Module):
        super().__init__(rank, world_size)
        self._model = model
        self._keeping_up = False
        self._inside = False
        model.register_forward_pre_hook(self._announce, prepend=True)
        model.register_forward_hook(self._done)

    @property
    def out_of_step(self) -> bool:
        """An error within a forward leaves the others in a collective that this rank will never join."""
        return self._inside

    @torch.inference_mode()
    def wait_for_others(self) -> None:
        """Run forwards for as long as another rank does."""
        device = next(self._model.parameters()).device
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        self._keeping_up = True
        try:
            while self._any(False):
                self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            self._keeping_up = False

    def _announce(self, *_: Any) -> None:
        if not self._keeping_up:
            self._any(True)
        self._inside = True

    def _done(self, *_: Any) -> None:
        self._inside = False

    def _any(self, mine: bool) -> bool:
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
        return bool(flag)
