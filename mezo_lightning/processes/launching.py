"""Starts the processes of a job on one machine, as Lightning does, and leaves them time to say what went wrong.

Lightning's own observer kills all processes, this one included, once a child has ended with an error: in the middle of
a message, a checkpoint or a report.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from mezo_lightning.processes.ranks import RankError
from mezo_lightning.processes.watchdog import Failure

_PARENT = "MEZO_PARENT"  # tells a process of a job which one started it
_GRACE = 5.0  # seconds in which a process that knows of a failure ends by itself


class Launcher(_SubprocessScriptLauncher):
    """Lightning's launcher, but for its observer; under torchrun and SLURM there is nothing to start.

    Args:
        cluster_environment: See Lightning.
        num_processes: On each machine.
        num_nodes: Machines.
        report: Told of an error before anything else is, and returns another rank's failure where that explains it.
    """

    def __init__(
        self,
        cluster_environment: ClusterEnvironment,
        num_processes: int,
        num_nodes: int,
        report: Callable[[BaseException], str | None],
    ):
        super().__init__(cluster_environment, num_processes, num_nodes)
        self._report = report
        self._children: list[subprocess.Popen] = []

    def launch(self, function: Callable, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other processes, and run a function on this one."""

        def reporting(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BaseException as error:
                cause = self._report(error)
                if cause is None:
                    raise
                raise RankError(cause) from error

        return super().launch(reporting, *args, trainer=trainer, **kwargs)

    def kill(self, signum: int) -> None:
        """Send a signal to the processes that this one started."""
        for child in self._children:
            child.send_signal(signum)

    def losses(self) -> list[Failure]:
        """The ranks whose processes were started here and have ended, in whatever way."""
        node = self.cluster_environment.node_rank()
        failures = []
        for place, child in enumerate(self._children, 1):
            code = child.poll()
            if code is not None:
                rank = node * self.num_processes + place
                size = self.num_nodes * self.num_processes
                failures.append(Failure(rank, f"rank {rank} of {size} (process {child.pid}) {_ending(code)}"))
        return failures

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context for what waits for all processes before there is a watchdog: one that is lost ends the job."""
        done = threading.Event()
        if self._children or _PARENT in os.environ:
            threading.Thread(target=self._watch, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def end_children(self) -> None:
        """Wait a little for the processes that were started here, and kill those that do not end."""
        deadline = time.monotonic() + _GRACE
        for child in self._children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            child.kill()

    def _call_children_scripts(self) -> None:
        os.environ[_PARENT] = str(os.getpid())
        super()._call_children_scripts()
        del os.environ[_PARENT]
        self._children, self.procs = self.procs, []  # Lightning's observer is given no children

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(1.0):
            causes = [failure.cause for failure in self.losses()]
            if os.environ.get(_PARENT, str(os.getppid())) != str(os.getppid()):
                causes.append("the process that started this one is gone")
            if causes and not done.wait(_GRACE):
                os.write(2, f"mezo: {causes[0]} before the job had begun\n".encode())
                self.end_children()
                os._exit(1)  # the main thread waits in a collective


def _ending(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed by signal 9, which is what the system sends when memory runs out"
    return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
