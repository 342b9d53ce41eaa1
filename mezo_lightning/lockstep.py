"""Two runs of a function by turns, so that what both come to can be done for both at once.

The follower has a stack of its own in the leader's thread (``greenlet``). In a second thread OpenMP would have a second
pool, and every small operation would wait for threads that the two take from one another: measured, half as fast.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from greenlet import getcurrent, greenlet

from mezo_lightning.interrupts import uninterrupted

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class Lockstep(Generic[Request, Answer, Result]):
    """Runs a function twice, each run waiting for the other where it calls ``ask``.

    Once the two ask for things that are not to be served together, the leader goes on alone to its end, and the
    follower after it. What a run raises is raised, the leader's first, as if one came after the other. No run is left
    while torch's settings for the thread are other than at the start, for the other run would have them as well:
    what it asks for then is served to it alone.

    Args:
        function: What to run; the leader is run 0, the follower run 1.
        serve: Answers requests, by the numbers of the runs that ask: one request, or one of each run.
        together: Whether the requests of the two can be served together.
        turn: Is told the number of the run that goes on now.
    """

    def __init__(
        self,
        function: Callable[[], Result],
        serve: Callable[[dict[int, Request]], list[Answer]],
        together: Callable[[Request, Request], bool],
        turn: Callable[[int], None],
    ):
        self._function = function
        self._serve = serve
        self._together = together
        self._turn = turn
        self._follower: Follower[Request, Answer, Result] = Follower(function)
        self._answer: Answer | None = None  # the follower's, until its turn
        self._apart = False
        self._settings = _settings()

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
        alone = self._apart or _settings() != self._settings
        if self._follower.is_running:
            return self._serve({1: request})[0] if alone else self._follower.ask(request)
        if not alone:
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

    It has the context variables that its caller had when it made this. As a context, its run is given up when the block
    is left.

    Args:
        function: What to run; it calls ``ask``.
    """

    def __init__(self, function: Callable[[], Result]):
        self.request: Request | None = None
        """What it waits for; None before it began, and once it has ended."""
        self._results: list[Result] = []
        self._error: Exception | None = None
        self._run = greenlet(self._outcome_of)
        self._run.gr_context = contextvars.copy_context()
        self._function = function

    @property
    def has_begun(self) -> bool:
        """Whether it was started."""
        return bool(self._run) or self._run.dead

    def start(self) -> None:
        """Let it run until its first request, or its end."""
        self.request = self._run.switch()

    def go_on(self, answer: Answer) -> None:
        """Answer its request, and let it run until its next one, or its end."""
        self.request = None
        self.request = self._run.switch(answer)

    @property
    def is_running(self) -> bool:
        """Whether it is this one that asks so."""
        return getcurrent() is self._run

    def ask(self, request: Request) -> Answer:
        """Within the function: wait for an answer."""
        leader = self._run.parent
        assert leader is not None
        return leader.switch(request)

    def result(self) -> Result:
        """What the function returned, once it has ended.

        Raises:
            Exception: What the function raised.
        """
        if self._error is not None:
            raise self._error
        return self._results[0]

    def __enter__(self) -> Follower[Request, Answer, Result]:
        return self

    def __exit__(self, *error: object) -> None:
        with uninterrupted():
            while self._run:
                self._run.throw()

    def _outcome_of(self) -> None:
        try:
            self._results.append(self._function())
        except Exception as error:  # others, such as Ctrl-C, go on to the leader at once
            self._error = error


def _settings() -> tuple[object, ...]:
    """What torch keeps for each thread and a context may change."""
    autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *autocast
