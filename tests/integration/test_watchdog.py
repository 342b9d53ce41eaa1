"""Whatever happens to one rank of a job, all of them end, and those that are left say why."""

import atexit
import contextlib
import os
import re
import signal
import tempfile
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import forks
import pytest
import torch
import torch.distributed as dist

from mezo_lightning.processes.ranks import Group, RankError
from mezo_lightning.processes.watchdog import Failure, Patience, Watchdog

pytestmark = pytest.mark.slow

HANG = "dist.barrier()  # which the others never come to"
TIMEOUT = 4.0
PLENTY = 60.0
"""Where ranks are to end by themselves, even on a busy machine."""


def run_rank(body: str, rank: int, world_size: int, timeout: float, store: str, told: Connection) -> None:
    """What a rank does: the lines of the test, and around them what a strategy does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    ranks = Group(rank, world_size)
    names = {
        "rank": rank, "ranks": ranks, "timeout": timeout, "dog": Watchdog(ranks, "127.0.0.1", timeout),
        "ready": lambda: told.send("ready"), "Failure": Failure, "RankError": RankError, "Watchdog": Watchdog,
        "atexit": atexit, "dist": dist, "os": os, "time": time,
    }  # fmt: skip
    try:
        exec(body, names)
    except BaseException as error:
        cause = names["dog"].report(error)
        if cause is not None:
            raise RankError(cause) from error
        raise
    finally:
        names["dog"].stop()


@dataclass
class Job:
    """The processes of a job, and what each wrote to stderr."""

    processes: list[BaseProcess]
    logs: list[Path]
    ready: list[Connection]

    def wait_until_ready(self) -> None:
        for connection in self.ready:
            assert connection.recv() == "ready"

    def codes(self) -> list[int]:
        """Exit codes, once all have ended; a job that hangs is an error."""
        return [forks.ended(process) for process in self.processes]

    def log(self, rank: int) -> str:
        return self.logs[rank].read_text()


@contextlib.contextmanager
def job(body: str, *, world_size: int = 2, timeout: float = TIMEOUT) -> Iterator[Job]:
    """A job whose ranks all run the same lines."""
    with tempfile.TemporaryDirectory() as name, forks.cleared() as processes, contextlib.ExitStack() as stack:
        folder = Path(name)
        running = Job(processes, [folder / f"{rank}.log" for rank in range(world_size)], [])
        for rank, log in enumerate(running.logs):
            ours, theirs = Pipe(duplex=False)
            running.ready.append(stack.enter_context(ours))
            with theirs:
                words = (textwrap.dedent(body), rank, world_size, timeout, f"{folder}/store", theirs)
                processes.append(forks.start(run_rank, *words, folder=folder, log=log))
        yield running


def ended_by_watchdog(log: str) -> str:
    """The cause that a watchdog gave for ending its process."""
    found = re.findall(r"^mezo: rank \d of \d is ended by its watchdog: (.*) \(the strategy's timeout is", log, re.M)
    assert len(found) == 1, log
    return found[0]


# -- a rank fails, the others hang -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failing", "world_size"), [(0, 2), (1, 3)])
def test_an_error_in_a_collective_ends_the_others_with_its_cause(failing: int, world_size: int):
    """The rank that fails lingers, so that its connections do not close: nothing else would wake the others."""
    body = f"""
    if rank == {failing}:
        dog.report(MemoryError("no room for the logits"))
        time.sleep(60)
    {HANG}
    """
    with job(body, world_size=world_size) as running:
        assert running.codes() == [1] * world_size
        cause = f"rank {failing} of {world_size} failed: MemoryError: no room for the logits"
        assert ended_by_watchdog(running.log(failing)) == cause  # it took too long to end
        for rank in range(world_size):  # one that has ended may wake another one up
            assert cause in running.log(rank).splitlines()[-1]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_fails_and_goes_leaves_the_cause_behind(failing: int):
    """Rank zero takes the store with it, but not before the others have read it.

    What wakes them is that a connection closes; the error that this raises is explained.
    """
    body = f"""
    if rank == {failing}:
        dog.report(MemoryError("no room for the logits"))
        dog.stop()
        os._exit(1)
    {HANG}
    """
    with job(body, timeout=PLENTY) as running:
        assert running.codes() == [1, 1]
        assert running.log(failing) == ""
        cause = f"rank {failing} of 2 failed: MemoryError: no room for the logits"
        assert running.log(1 - failing).endswith(f"RankError: {cause}\n")


def test_an_error_that_all_ranks_know_of_is_left_to_them():
    body = """
    def action():
        if rank == 1:
            raise ValueError("no such column")
    ranks.gather(action)
    """
    with job(body, timeout=PLENTY) as running:
        assert running.codes() == [1, 1]
        assert running.log(0).endswith("RankError: rank 1 of 2 failed: ValueError: no such column\n")
        assert running.log(1).endswith("ValueError: no such column\n")
        assert "is ended by" not in running.log(0) + running.log(1)


def test_a_runtime_error_of_ones_own_is_no_other_ranks_fault():
    body = f"""
    if rank == 1:
        raise RuntimeError("shapes do not match")
    {HANG}
    """
    with job(body, timeout=PLENTY) as running:
        assert running.codes() == [1, 1]
        assert running.log(1).endswith("RuntimeError: shapes do not match\n")
        assert "rank 1 of 2 failed: RuntimeError: shapes do not match" in running.log(0)


@pytest.mark.parametrize("survivor_hangs", [True, False])
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank(killed: int, survivor_hangs: bool):
    """The other rank is in a collective, or in the middle of something that will take it long."""
    body = f"""
    ready()
    if rank == {killed} or not {survivor_hangs}:
        time.sleep(60)
    {HANG}
    """
    with job(body, timeout=PLENTY if survivor_hangs else TIMEOUT) as running:
        running.wait_until_ready()
        time.sleep(0.5)
        forks.send(running.processes[killed], signal.SIGKILL)
        codes = running.codes()
        assert codes[killed] == -signal.SIGKILL
        assert codes[1 - killed] == 1
        log = running.log(1 - killed)
        known = "rank 0 of 2 has ended without a word" if killed == 0 else "rank 1 of 2 has given no sign of life"
        assert known in (log.splitlines()[-1] if survivor_hangs else ended_by_watchdog(log))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_process_that_stands_still(frozen: int):
    """No connection closes; and when it wakes up again, without the others, it ends as well."""
    body = f"""
    ready()
    ranks.gather(lambda: time.sleep(60) if rank == {frozen} else None)
    """
    with job(body) as running:
        running.wait_until_ready()
        time.sleep(0.5)
        forks.send(running.processes[frozen], signal.SIGSTOP)
        assert forks.ended(running.processes[1 - frozen]) == 1
        cause = ended_by_watchdog(running.log(1 - frozen))
        assert cause.startswith(f"rank {frozen} of 2 has given no sign of life for ")
        forks.send(running.processes[frozen], signal.SIGCONT)
        assert running.codes() == [1, 1]
        assert "is ended by its watchdog: rank" in running.log(frozen)


def test_a_process_that_was_lost_is_told_to_all():
    """What only the one who started it can see."""
    body = f"""
    if rank == 2:
        time.sleep(60)
    if rank == 1:
        dog._losses = lambda: [Failure(2, "rank 2 of 3 (process 17) was killed")]
    {HANG}
    """
    with job(body, world_size=3) as running:
        assert running.codes() == [1, 1, 1]
        for rank in range(3):  # one that has ended may wake another one up
            assert "rank 2 of 3 (process 17) was killed" in running.log(rank).splitlines()[-1]


def test_what_hangs_after_an_error_on_the_way_out_is_ended():
    """As the end of a NCCL communicator may, without the other ranks."""
    body = """
    atexit.register(time.sleep, 60)
    raise ValueError("no")
    """
    with job(body) as running:
        assert running.codes() == [1, 1]
        for rank in range(2):
            assert ended_by_watchdog(running.log(rank)) == f"it did not end within {TIMEOUT:g} s of its own error"


# -- nothing fails -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slow", [0, 1])
def test_slow_ranks_are_waited_for(slow: int):
    """In a step, as a person's judgement may take; holding the GIL for a while; and at the end of the job."""
    body = f"""
    def think():
        if rank == {slow}:
            time.sleep(2 * timeout)
            re_started = time.monotonic()
            while time.monotonic() < re_started + 0.4 * timeout:
                sum(range(10**7))  # holds the GIL
    ranks.gather(think)
    if rank == {slow}:
        time.sleep(2 * timeout)
    """
    with job(body, timeout=3.0) as running:
        assert running.codes() == [0, 0]
        assert "is ended by" not in running.log(0) + running.log(1)


def test_a_job_that_was_suspended_goes_on():
    body = """
    ready()
    ranks.gather(lambda: [time.sleep(0.1) for _ in range(50)])
    """
    with job(body, world_size=3, timeout=4.0) as running:
        running.wait_until_ready()
        for _ in range(4):
            time.sleep(0.5)
            for process in running.processes:
                forks.send(process, signal.SIGSTOP)
            time.sleep(4)
            for process in running.processes:
                forks.send(process, signal.SIGCONT)
        assert running.codes() == [0, 0, 0]
        assert "is ended by" not in running.log(0) + running.log(1) + running.log(2)


def test_an_error_that_was_caught_leaves_the_process_alone():
    """A program may go on after a fit that failed on all ranks, and fit again.

    On a busy machine torch has a word to say where rank zero, which keeps the store, leaves first.
    """
    body = """
    def action():
        raise ValueError("try again")
    for _ in range(2):
        try:
            ranks.gather(action)
        except (ValueError, RankError) as error:
            dog.report(error)
        dog.stop()
        dog = Watchdog(ranks, "127.0.0.1", timeout)
    time.sleep(2 * timeout)
    ranks.gather(lambda: None)
    """
    with job(body, timeout=4.0) as running:
        assert running.codes() == [0, 0]
        assert "is ended by" not in running.log(0) + running.log(1)


@pytest.mark.parametrize("timeout", [0.1, 1.0, 4.0, 30.0, 600.0, 86400.0])
def test_what_is_waited_for_adds_up_to_the_timeout(timeout: float):
    patience = Patience(timeout)
    assert patience.silence + patience.grace + 2 * patience.beat <= timeout
    assert patience.silence >= 3 * patience.beat
    assert patience.suspicion <= patience.silence
    assert patience.grace >= 2 * patience.beat
