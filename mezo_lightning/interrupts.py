"""Ctrl-C waits until weights are whole again."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[AbstractContextManager[None]]:
    """Hold back SIGINT and SIGTERM during a block; they are delivered to their handlers right after it.

    The block is given a context for user's code within it, in which they are delivered at once again. Python runs
    signal handlers in the main thread only: elsewhere there is nothing to hold back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield nullcontext()
        return
    interruptible = _Interruptible()
    interruptible.hold()
    try:
        yield interruptible
    finally:
        interruptible.release()


class _Interruptible(AbstractContextManager[None]):
    """The handlers of the two signals, and what came for them meanwhile; as a context, an end to the holding back.

    No generator: one that is interrupted on its way out would hold signals back when it is collected, much later.
    """

    def __init__(self) -> None:
        signals = (signal.SIGINT, signal.SIGTERM)
        # A handler that was not installed from Python is None, and cannot be put back from Python.
        self._handlers = {int(s): handler for s in signals if callable(handler := signal.getsignal(s))}
        self._held: list[tuple[int, FrameType | None]] = []

    def hold(self) -> None:
        for number in self._handlers:
            signal.signal(number, lambda number, frame: self._held.append((number, frame)))

    def release(self) -> None:
        # SIGINT comes last: its handler may raise as soon as it is back, and nothing may be left to put back then.
        for number in reversed(self._handlers):
            signal.signal(number, self._handlers[number])
        while self._held:
            number, frame = self._held.pop(0)
            self._handlers[number](number, frame)

    def __enter__(self) -> None:
        self.release()

    def __exit__(self, *error: object) -> None:
        self.hold()
