"""Two runs of a function by turns, so that what both come to can be done for both at once.

Only one of the two ever runs: the leader, in the caller's thread, or the follower, in a thread of its own while the
leader waits for it. Nothing is shared out over processors, and nothing has to be locked.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from mezo_lightning.interrupts import uninterrupted

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Lockstep(Generic[Request, Answer, Result]):
    """Runs a function twice, each run waiting for the other where it calls ``ask``.

    Once the two ask for things that are not to be served together, the leader goes on alone to its end, and the
    follower after it. What a run raises is raised, the leader's first, as if one came after the other.

    Args:
        function: What to run; the leader is run 0, the follower run 1.
        serve: Answers requests, by the numbers of the runs that ask: one request, or one of each run.
        together: Whether the requests of the two can be served together.
        turn: Is told the number of the run that goes on now.
        device: Whose settings the follower needs beside the CPU's.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        serve: Callable[[dict[int, Request]], list[Answer]],
        together: Callable[[Request, Request], bool],
        turn: Callable[[int], None],
        device: torch.device,
    ):
        self._function = function
        self._serve = serve
        self._together = together
        self._turn = turn
        self._follower: Follower[Request, Answer, Result] = Follower(function, device)
        self._answer: Answer | None = None  # the follower's, until its turn
        self._apart = False

    def __call__(self) -> tuple[Result, Result]:
        """The results of both runs."""
        with self._follower:
            self._turn(0)
            first = self._function()
            self._apart = True
            self._let_follow()
            return first, self._follower.result()

    def ask(self, request: Request) -> Answer:
        """Within the function: have a request served."""
        if self._follower.is_running:
            return self._serve({1: request})[0] if self._apart else self._follower.ask(request)
        if not self._apart:
            self._let_follow()
            self._turn(0)
            other = self._follower.request
            if other is not None and self._together(request, other):
                mine, self._answer = self._serve({0: request, 1: other})
                return mine
            self._apart = True
        return self._serve({0: request})[0]

    def _let_follow(self) -> None:
        """Let the follower go on to its next request, or to its end."""
        self._turn(1)
        if not self._follower.has_begun:
            self._follower.start()
        elif self._follower.request is not None:
            answer, self._answer = self._answer, None
            self._follower.go_on(self._serve({1: self._follower.request})[0] if answer is None else answer)


class Follower(Generic[Request, Answer, Result]):
    """A run of a function that moves only while its caller waits for it, from one request to the next.

    It has torch's settings and the context variables that its caller had when it made this; not the modes of
    ``torch.overrides``. As a context, its run is given up when the block is left.

    Args:
        function: What to run; it calls ``ask``.
        device: Whose settings it needs beside the CPU's.
    """

    def __init__(self, function: Callable[[], Result], device: torch.device):
        self.request: Request | None = None
        """What it waits for; None before it began, and once it has ended."""
        self.has_begun = False
        self._requests: SimpleQueue[Request | None] = SimpleQueue()
        self._answers: SimpleQueue[Answer | _Abandoned] = SimpleQueue()
        self._results: list[Result] = []
        self._error: BaseException | None = None
        run = partial(self._run, function, _settings(device))
        self._thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True)

    def start(self) -> None:
        """Let it run until its first request, or its end."""
        self.has_begun = True
        self._thread.start()
        self.request = self._requests.get()

    def go_on(self, answer: Answer) -> None:
        """Answer its request, and let it run until its next one, or its end."""
        self.request = None
        self._answers.put(answer)
        self.request = self._requests.get()

    @property
    def is_running(self) -> bool:
        """Whether it is this one that asks so."""
        return threading.current_thread() is self._thread

    def ask(self, request: Request) -> Answer:
        """Within the function: wait for an answer."""
        self._requests.put(request)
        answer = self._answers.get()
        if isinstance(answer, _Abandoned):
            raise answer
        return answer

    def result(self) -> Result:
        """What the function returned, once it has ended.

        Raises:
            BaseException: What the function raised.
        """
        if self._error is not None:
            raise self._error
        return self._results[0]

    def __enter__(self) -> Follower[Request, Answer, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        with uninterrupted():
            while self._thread.is_alive():
                self._answers.put(_Abandoned())
                self._thread.join(0.01)

    def _run(self, function: Callable[[], Result], settings: Sequence[AbstractContextManager[object]]) -> None:
        try:
            with ExitStack() as stack:
                for setting in settings:
                    stack.enter_context(setting)
                self._results.append(function())
        except BaseException as error:
            self._error = error
        self._requests.put(None)


class _Abandoned(BaseException):
    """Nobody waits for the follower any more."""


def _settings(device: torch.device) -> list[AbstractContextManager[object]]:
    """Contexts in which another thread runs as this one does: torch keeps these settings for each thread."""
    settings: list[AbstractContextManager[object]] = [torch.inference_mode(torch.is_inference_mode_enabled())]
    if torch.get_default_device().type != "cpu":
        settings.append(torch.get_default_device())
    if device.type == "cuda":
        settings.append(torch.cuda.stream(torch.cuda.current_stream(device)))
    cast = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
    return settings + [torch.autocast(kind, torch.get_autocast_dtype(kind)) for kind in cast]
