"""Ends a job where no exception can: in a collective that a rank waits for and another one will never join.

Every rank gives signs of life, and reads whether another rank has failed, by way of a ``TCPStore`` on rank zero that
serves nothing else. Whoever learns of a failure and cannot raise it by itself says why on stderr and ends its process.

=====================================  ==========================================  =====================================
what goes wrong                        who notices                                 when the others end
=====================================  ==========================================  =====================================
an error within a collective           the rank itself, which says so              after a few seconds (``grace``)
a process that is killed               the process that started it, where it did   after a few seconds
rank zero's process that is killed     every rank: its connection is closed        after a few seconds
a machine that is gone, or a process   rank zero, for want of signs of life, and   within ``timeout``
that stands still                      if it is rank zero, every rank
=====================================  ==========================================  =====================================

A slow rank does not fail, however long it takes: signs of life come from a thread of their own. Silence is counted only
while the listener runs, so that a job that was suspended as a whole accuses nobody when it goes on.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from queue import SimpleQueue
from typing import Literal

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from mezo_lightning.processes.ranks import RankError, Ranks

State = Literal["runs", "wonders", "knows", "left"]
"""What a rank says of itself: all is well; it has an error that may be due to another rank's end; it knows of a
failure; it needs the others no more."""

_FAILURE = "failure"
_LONGEST = 2000  # characters of an error's message
_FOREVER = timedelta(days=30)  # no time limit of the store's own: silence is judged here


@dataclass(frozen=True)
class Failure:
    """Why a job ends."""

    rank: int
    """Who failed."""
    cause: str
    """A sentence with the rank in it."""

    def __str__(self) -> str:
        return f"{self.rank} {self.cause}"

    @staticmethod
    def parse(text: str) -> Failure:
        """The failure that ``str`` made the text of."""
        rank, cause = text.split(" ", 1)
        return Failure(int(rank), cause)


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds, such that a job ends within its time-out."""

    timeout: float

    @property
    def beat(self) -> float:
        """Between two signs of life."""
        return min(1.0, self.timeout / 10)

    @property
    def grace(self) -> float:
        """For a rank to raise an error by itself once it may know of a failure."""
        return min(10.0, self.timeout / 5)

    @property
    def silence(self) -> float:
        """Without a sign of life, until a rank counts as failed."""
        return self.timeout - 2 * self.grace

    @property
    def suspicion(self) -> float:
        """The same, once there is an error somewhere that a rank's end would explain."""
        return 3 * self.beat


class Watchdog:
    """Watches the other ranks from one of them. All ranks make theirs together.

    Args:
        ranks: The processes of the job.
        host: The name of rank zero's machine.
        timeout: Seconds within which a job ends whose ranks cannot reach one another.
        losses: Finds the ranks whose processes have ended, of those that this process started; called at every beat.
        farewell: Called before this process is ended.
    """

    def __init__(
        self,
        ranks: Ranks,
        host: str,
        timeout: float,
        losses: Callable[[], Sequence[Failure]] = tuple,
        farewell: Callable[[], None] = lambda: None,
    ):
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self._patience = Patience(timeout)
        self._losses = losses
        self._farewell = farewell
        self._accusations: SimpleQueue[Failure] = SimpleQueue()
        self._failure: Failure | None = None
        self._known = threading.Event()
        """Set once there is a failure."""
        self._wonders = self._raising = False
        self._stopping: float | None = None
        """When this rank began to leave; its clock is ``time.monotonic``."""
        self._beats: dict[int, str] = {}
        self._silent: dict[int, float] = {}
        self._since_failure = 0.0
        self._wake = threading.Event()
        self._over = threading.Event()
        self._exiting = threading.Event()
        store = self._connect(ranks, host)
        self._talker = threading.Thread(target=self._talk, args=(store,), name="watchdog-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._watch, name="watchdog-judge", daemon=True).start()

    def _connect(self, ranks: Ranks, host: str) -> TCPStore:
        limit = timedelta(seconds=self._patience.timeout)
        own: list[TCPStore] = []

        def serve() -> int:
            if self.rank > 0:
                return 0
            own.append(TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit))
            for key in (_FAILURE, *map(_key, range(self.world_size))):
                own[0].set(key, "")  # reading a key that is not there would wait for it
            return own[0].port

        port = ranks.gather(serve)[0]
        store = ranks.together(
            lambda: own[0] if own else TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        )
        store.set_timeout(_FOREVER)
        return store

    # -- for the main thread -------------------------------------------------------------------------------------------

    def report(self, error: BaseException) -> str | None:
        """Tell the other ranks of the error that ends this one.

        What it looks like when another rank's process ends is a RuntimeError of torch's: before such an error is passed
        on, there is a moment's time to learn of its cause.

        Args:
            error: What is about to be raised.

        Returns:
            The failure of another rank that explains the error, if there is one.
        """
        self._raising = True
        atexit.register(self._exiting.set)
        if isinstance(error, RankError):  # which all ranks know of
            return None
        if type(error) is RuntimeError or isinstance(error, dist.DistError):
            self._wonders = True
            self._wake.set()
            if self._known.wait(self._patience.suspicion + 2 * self._patience.beat):
                assert self._failure is not None
                return self._failure.cause if self._failure.rank != self.rank else None
        summary = f"{type(error).__name__}: {error}"[:_LONGEST]
        self._accuse(self._failed(self.rank, f"failed: {summary}"))
        self._known.wait(self._patience.grace)
        return None

    def stop(self) -> None:
        """Leave in good order. Rank zero waits for all others, whatever time they take, unless something failed."""
        self._stopping = time.monotonic()
        self._wake.set()
        self._talker.join(None if self.rank == 0 else self._patience.grace)
        self._over.set()

    # -- the thread that talks to the store, which blocks if rank zero's machine is gone -------------------------------

    def _talk(self, store: TCPStore) -> None:
        count = 0
        try:
            while not self._exchange(store, count):
                count += 1
                self._wake.wait(self._patience.beat / (1 if self._stopping is None else 20))
                self._wake.clear()
        except dist.DistNetworkError:
            self._learn(self._failed(0, "has ended without a word: its connection is closed"))

    def _exchange(self, store: TCPStore, count: int) -> bool:
        """Say and hear the news; whether it was for the last time."""
        leaves = self._stopping is not None
        while not self._accusations.empty():
            accusation = self._accusations.get()
            if not store.get(_key(accusation.rank)).endswith(b"left"):
                store.compare_set(_FAILURE, "", str(accusation))  # the first one counts
        failure = store.get(_FAILURE).decode()
        if failure:
            self._learn(Failure.parse(failure))
        store.set(_key(self.rank), f"{count} {'left' if leaves else self._state}")
        if self.rank > 0:
            self._beats = {0: str(count)}  # it has answered
            return leaves or self._failure is not None
        others = range(1, self.world_size)
        self._beats = dict(zip(others, (beat.decode() for beat in store.multi_get([*map(_key, others)])), strict=True))
        return leaves and not self._is_needed()

    @property
    def _state(self) -> State:
        return "knows" if self._failure is not None else "wonders" if self._wonders else "runs"

    def _is_needed(self) -> bool:
        """Whether another rank still has to learn something from rank zero's store."""
        assert self._stopping is not None
        if self._failure is None:
            return not all(beat.endswith("left") for beat in self._beats.values())
        told = all(beat.endswith(("knows", "left")) for rank, beat in self._beats.items() if rank != self._failure.rank)
        return not told and time.monotonic() < self._stopping + self._patience.grace

    def _accuse(self, failure: Failure) -> None:
        if self.rank > 0 and failure.rank == 0:
            self._learn(failure)  # there is nobody to tell
        else:
            self._accusations.put(failure)
            self._wake.set()

    def _learn(self, failure: Failure) -> None:
        if self._failure is None:
            self._failure = failure
            self._known.set()

    # -- the thread that judges ----------------------------------------------------------------------------------------

    def _watch(self) -> None:
        heard: dict[int, str] = {}
        before = time.monotonic()
        while not self._over.wait(self._patience.beat):
            now = time.monotonic()
            passed = min(now - before, 2 * self._patience.beat)  # more means that it was this process that stood still
            before = now
            beats = self._beats
            for rank, beat in beats.items():
                lives = beat != heard.get(rank) or beat.endswith("left")
                self._silent[rank] = 0.0 if lives else self._silent.get(rank, 0.0) + passed
            heard = beats
            self._decide(passed)
        if self._raising:  # the interpreter may wait for other ranks on its way out
            self._exiting.wait()
            time.sleep(self._patience.timeout)
            self._end(f"it did not end within {self._patience.timeout:g} s of its own error")

    def _decide(self, passed: float) -> None:
        if self._failure is None:
            self._look_for_failures()
            return
        self._since_failure += passed
        if self._since_failure > (self._patience.timeout if self._raising else self._patience.grace):
            self._end(self._failure.cause)

    def _look_for_failures(self) -> None:
        wonders = self._wonders or any(beat.endswith("wonders") for beat in self._beats.values())
        limit = self._patience.suspicion if wonders else self._patience.silence
        for failure in self._losses():
            self._accuse(failure)
        for rank, silent in self._silent.items():
            if silent > limit:
                why = "its process is dead or stands still, or its machine cannot be reached"
                self._accuse(self._failed(rank, f"has given no sign of life for {silent:.1f} s: {why}"))

    def _failed(self, rank: int, how: str) -> Failure:
        return Failure(rank, f"rank {rank} of {self.world_size} {how}")

    def _end(self, cause: str) -> None:
        text = (
            f"mezo: rank {self.rank} of {self.world_size} is ended by its watchdog: {cause} "
            f"(the strategy's timeout is {self._patience.timeout:g} s)\n"
        )
        os.write(2, text.encode())  # whatever holds sys.stderr
        flush = threading.Thread(target=sys.stdout.flush, daemon=True)
        flush.start()
        flush.join(self._patience.beat)
        self._farewell()
        os._exit(1)  # an exception would never get to the main thread, nor would the interpreter end without it


def _key(rank: int) -> str:
    return f"rank {rank}"
