"""Calls of rewards: concurrent where they can be, killed where they must be, and never raising."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mezo_lightning.rewarding.calls import Inline, InWorkers, OnLoop, caller_of

SLOW = """
import os, time

class Odd(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")

def score(what, path=""):
    if what == "spin":
        open(path, "w").write(str(os.getpid()))
        while True:
            pass
    if what == "die":
        os._exit(3)
    if what == "odd":
        raise Odd(1, 2)
    if what == "value":
        raise ValueError("no such thing")
    if what == "lambda":
        return [lambda: 1]
    return [what, os.getpid()]
"""


def values(caller: Any, *calls: dict[str, Any]) -> list[Any]:
    return [each.value for each in caller.start(calls)()]


def test_plain_functions_run_here_one_after_another() -> None:
    seen = []

    def reward(x: int) -> int:
        seen.append((x, threading.current_thread() is threading.main_thread()))
        if x == 2:
            raise LookupError("two")
        return x

    found = values(caller_of(reward), {"x": 1}, {"x": 2}, {"x": 3})
    assert seen == [(1, True), (2, True), (3, True)]
    assert (found[0], found[2]) == (1, 3)
    assert isinstance(found[1], LookupError)


def test_what_is_no_exception_but_a_failure_all_the_same() -> None:
    class MathVerifyTimeout(BaseException):
        pass

    def reward() -> None:
        raise MathVerifyTimeout("too hard")

    [found] = values(Inline(reward), {})
    assert isinstance(found, RuntimeError)
    assert str(found) == "MathVerifyTimeout: too hard"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_whoever_wants_to_stop_may(stop: type[BaseException]) -> None:
    def reward() -> None:
        raise stop

    with pytest.raises(stop):
        Inline(reward).start([{}])()


def test_async_calls_run_at_the_same_time_on_one_loop_that_stays() -> None:
    loops, running, most = set(), 0, 0

    async def reward(x: int) -> int:
        nonlocal running, most
        loops.add(asyncio.get_running_loop())
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        if x == 3:
            raise LookupError("three")
        return x

    caller = caller_of(reward, is_async=True)
    for _ in range(2):
        found = values(caller, *({"x": x} for x in range(8)))
        assert isinstance(found.pop(3), LookupError)
        assert found == [0, 1, 2, 4, 5, 6, 7]
    assert most == 8
    assert len(loops) == 1
    assert threading.current_thread() is threading.main_thread()


async def _one() -> int:
    return 1


def _in_a_fork() -> None:
    assert values(OnLoop(_one, timeout=20), {}) == [1]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # that is what is tested
def test_a_fork_has_a_loop_of_its_own() -> None:
    assert values(OnLoop(_one), {}) == [1]
    process = multiprocessing.get_context("fork").Process(target=_in_a_fork)
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert (alive, process.exitcode) == (False, 0)


def test_async_calls_go_on_while_something_else_is_done() -> None:
    began = threading.Event()

    async def reward() -> str:
        began.set()
        return "done"

    wait = OnLoop(reward).start([{}])
    assert began.wait(10)
    assert [each.value for each in wait()] == ["done"]


def test_async_calls_that_take_too_long_are_cancelled_alone() -> None:
    cancelled = threading.Event()

    async def reward(seconds: float) -> float:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return seconds

    late, early = OnLoop(reward, timeout=0.2).start([{"seconds": 60}, {"seconds": 0}])()
    assert isinstance(late.value, TimeoutError)
    assert str(late.value) == "no answer within 0.2 s"
    assert early.value == 0
    assert cancelled.is_set()
    assert late.seconds >= 0.2 > early.seconds


def test_ctrl_c_ends_the_wait_and_the_call() -> None:
    cancelled = threading.Event()

    async def reward() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    wait = OnLoop(reward).start([{}])
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        wait()
    timer.join()
    assert cancelled.wait(10)


def test_a_time_out_of_the_rewards_own_keeps_its_words() -> None:
    async def reward() -> None:
        raise TimeoutError("the judge is slow today")

    assert str(values(OnLoop(reward, timeout=60), {})[0]) == "the judge is slow today"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InWorkers]:
    path = tmp_path_factory.mktemp("worker") / "slow.py"
    path.write_text(SLOW)
    caller = caller_of(print, importable=f"{path}:score", timeout=1.0, parallel=True)
    assert isinstance(caller, InWorkers)
    yield caller
    caller.close()


def test_a_call_that_takes_too_long_is_killed_and_others_are_not(workers: InWorkers, tmp_path: Path) -> None:
    spinning, fine = workers.start([{"what": "spin", "path": str(tmp_path / "pid")}, {"what": "fine"}])()
    assert isinstance(spinning.value, TimeoutError)
    assert str(spinning.value) == "no answer within 1 s"
    assert fine.value[0] == "fine"
    assert fine.value[1] != os.getpid()
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
    assert values(workers, {"what": "again"})[0][0] == "again"


def test_whatever_goes_wrong_in_a_process_is_that_calls_failure(workers: InWorkers) -> None:
    calls = [{"what": "odd"}, {"what": "value"}, {"what": "lambda"}, {"what": "die"}, {"what": "fine"}]
    odd, value, strange, dead, fine = values(workers, *calls)
    assert str(odd) == "Odd: 1 and 2"
    assert isinstance(value, ValueError)
    assert str(value) == "no such thing"
    assert isinstance(strange, Exception)
    assert isinstance(dead, Exception)
    assert fine[0] == "fine"


def test_arguments_that_cannot_travel_are_that_calls_failure(workers: InWorkers) -> None:
    bad, fine = values(workers, {"what": lambda: 1}, {"what": "fine"})
    assert isinstance(bad, Exception)
    assert fine[0] == "fine"


def test_a_time_limit_needs_something_that_can_be_stopped() -> None:
    with pytest.raises(ValueError, match=r"Reward reward has timeout=3.* no function with an import path"):
        caller_of(lambda: 1, timeout=3)
    with pytest.raises(ValueError, match="must be a positive number"):
        caller_of(print, importable="builtins.print", timeout=0)


def test_a_path_that_is_gone_is_said_by_the_call(tmp_path: Path) -> None:
    caller = InWorkers(f"{tmp_path / 'nothing.py'}:score", timeout=20)
    try:
        [found] = values(caller, {"what": "fine"})
        assert isinstance(found, FileNotFoundError)
    finally:
        caller.close()
