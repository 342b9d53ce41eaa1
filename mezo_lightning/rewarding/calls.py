"""Ways to call what judges completions: here and now, on an event loop, or in a process that can be killed.

=============  ========================================  =============================================================
caller         for                                       a time limit
=============  ========================================  =============================================================
``Inline``     plain functions, in this very thread      none: a thread cannot be stopped. Time-outs by signals, as
                                                         math_verify has, work in the main thread only
``OnLoop``     ``async`` functions, all calls at once    cancels the call
``InWorkers``  functions with an import path             kills the process, whatever it is doing
=============  ========================================  =============================================================

A call never raises: what it raises is what it returned.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import multiprocessing
import os
import pickle
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pebble import ProcessPool

Arguments = Mapping[str, Any]
"""Of one call, by name."""

_GOODBYE = 2.0  # seconds at most, at the end of the process
_MOST_WORKERS = 4  # each is a Python of its own, with all that the reward imports
_LEAST_WORKERS = 2  # one to go on with while the other is killed and started again, which takes seconds


class Listener:
    """An argument of a call by which the function says something; one of another process is heard when it is done.

    Args:
        hear: Is called with whatever the function says.
    """

    def __init__(self, hear: Callable[..., None]):
        self._hear = hear

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._hear(*args, **kwargs)


@dataclass(frozen=True)
class Returned:
    """What came of one call."""

    value: Any
    """What was returned, or the exception that was raised."""
    seconds: float
    """How long it took."""


Wait = Callable[[], list[Returned]]
"""Waits for calls that were started, and says what each returned."""


class Caller(ABC):
    """Calls one function."""

    @abstractmethod
    def start(self, calls: Sequence[Arguments]) -> Wait:
        """Begin calls; they may go on while other things are done, and are given up where waiting for them raises.

        Args:
            calls: The arguments of each.
        """


def caller_of(
    function: Callable[..., Any],
    *,
    is_async: bool = False,
    importable: str | None = None,
    timeout: float | None = None,
    parallel: bool = False,
    name: str = "reward",
) -> Caller:
    """The way to call a function.

    Args:
        function: The function.
        is_async: Whether it returns a coroutine.
        importable: Its import path, by which another process finds it.
        timeout: Seconds that a call may take; None for as long as it wants.
        parallel: Whether there will be several calls at a time.
        name: What error messages call it.

    Raises:
        ValueError: If a time limit cannot be kept.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"Reward {name} has timeout={timeout}, which must be a positive number of seconds, or null.")
    if is_async:
        return OnLoop(function, timeout)
    if timeout is None:
        return Inline(function)
    if importable is None:
        raise ValueError(
            f"Reward {name} has timeout={timeout}, and is no function with an import path: only another process can be "
            "stopped in the middle of a call, and it has to find the function by itself. Write the reward as a "
            "function of a module or file and give its path, write it with async def, or leave the timeout out."
        )
    most = min(_MOST_WORKERS, os.cpu_count() or 1) if parallel else 1
    return InWorkers(importable, timeout, max(_LEAST_WORKERS, most))


class Inline(Caller):
    """Calls a function in the thread that waits."""

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def start(self, calls: Sequence[Arguments]) -> Wait:
        return lambda: [self._call(arguments) for arguments in calls]

    def _call(self, arguments: Arguments) -> Returned:
        started = time.perf_counter()
        try:
            value = self._function(**arguments)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # math_verify's time-out is no Exception
            value = _exception(error)
        return Returned(value, time.perf_counter() - started)


class OnLoop(Caller):
    """Calls an ``async`` function on the event loop that all rewards share, so that clients may keep connections open.

    Args:
        function: Returns a coroutine.
        timeout: Seconds for each call.
    """

    def __init__(self, function: Callable[..., Coroutine[Any, Any, Any]], timeout: float | None = None):
        self._function = function
        self._timeout = timeout

    def start(self, calls: Sequence[Arguments]) -> Wait:
        future = event_loop().submit(self._all(calls))
        return lambda: _result(future)

    async def _all(self, calls: Sequence[Arguments]) -> list[Returned]:
        return await asyncio.gather(*(self._call(arguments) for arguments in calls))

    async def _call(self, arguments: Arguments) -> Returned:
        started = time.perf_counter()
        try:
            value = await asyncio.wait_for(self._function(**arguments), self._timeout)
        except asyncio.CancelledError:
            raise  # nobody waits any more
        except Exception as error:
            late = self._timeout is not None and isinstance(error, asyncio.TimeoutError) and not str(error)
            value = _too_late(self._timeout) if late else error
        return Returned(value, time.perf_counter() - started)


class InWorkers(Caller):
    """Calls a function in other processes, which are killed when a call takes too long and replaced.

    Args:
        path: The function's import path.
        timeout: Seconds for each call; importing the function does not count.
        workers: How many calls may run at a time; a process each.
    """

    def __init__(self, path: str, timeout: float, workers: int = 1):
        self._path = path
        self._timeout = timeout
        self._workers = workers
        self._started: ProcessPool | None = None

    def start(self, calls: Sequence[Arguments]) -> Wait:
        from rewards._worker import call

        begun = time.perf_counter()
        pool, ends = self._pool(), dict[Any, float]()
        futures, listening = [], []
        for arguments in calls:
            listeners = {name: value for name, value in arguments.items() if isinstance(value, Listener)}
            told = {name: value for name, value in arguments.items() if name not in listeners}
            future = pool.schedule(call, args=(self._path, told, tuple(listeners)), timeout=self._timeout)
            future.add_done_callback(lambda done: ends.setdefault(done, time.perf_counter()))
            futures.append(future)
            listening.append(listeners)

        def wait() -> list[Returned]:
            try:
                values = [self._value(*each) for each in zip(futures, listening, strict=True)]
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
            return [
                Returned(value, ends.get(future, time.perf_counter()) - begun)
                for future, value in zip(futures, values, strict=True)
            ]

        return wait

    def _value(self, future: Future[bytes], listeners: Mapping[str, Listener]) -> Any:
        import concurrent.futures

        try:
            value, said = pickle.loads(future.result())
            for name, args, kwargs in said:
                listeners[name](*args, **kwargs)
            return value
        except concurrent.futures.TimeoutError:  # Python 3.10 has two of them
            return _too_late(self._timeout)
        except Exception as error:  # the process crashed, or what it sent cannot be read here
            return error

    def _pool(self) -> ProcessPool:
        if self._started is None:
            from pebble import ProcessPool

            from rewards._worker import prepare

            self._started = ProcessPool(
                max_workers=self._workers,
                initializer=prepare,
                initargs=(self._path,),
                context=multiprocessing.get_context("spawn"),
            )
            self._end = weakref.finalize(self, _end, self._started)
        return self._started

    def close(self) -> None:
        """End the processes; they end with this one anyway."""
        if self._started is not None:
            self._end()
            self._started = None


def _end(pool: ProcessPool) -> None:
    pool.stop()
    pool.join()


class EventLoop:
    """An event loop in a thread of its own, for as long as the process lives."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()
        atexit.register(self._stop)

    def submit(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Run a coroutine on the loop, from any other thread."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _stop(self) -> None:
        """Let clients close their connections, which they do when the loop shuts their generators down."""
        if not self._thread.is_alive():  # it is the parent's, and this process a fork
            return
        with contextlib.suppress(Exception):
            self.submit(self._loop.shutdown_asyncgens()).result(timeout=_GOODBYE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_GOODBYE)


@functools.cache
def event_loop() -> EventLoop:
    """The loop that all ``async`` rewards of this process run on."""
    return EventLoop()


os.register_at_fork(after_in_child=event_loop.cache_clear)  # threads stay behind


def _result(future: Future[Any]) -> Any:
    try:
        return future.result()
    except BaseException:  # Ctrl-C above all
        future.cancel()
        raise


def _too_late(timeout: float | None) -> TimeoutError:
    return TimeoutError(f"no answer within {timeout:g} s")


def _exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    wrapped = RuntimeError(f"{type(error).__name__}: {error}")
    wrapped.__cause__ = error
    return wrapped
