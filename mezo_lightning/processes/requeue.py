"""Signals that ask a job to be requeued, or to end, are acted on between two steps and by all ranks together.

Lightning acts on them inside their handlers. On SLURM's signal it saves a checkpoint there, in the middle of an update
or of a probe; with several processes it also runs collectives there (for SIGTERM as well), at another moment on each.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from mezo_lightning.processes.ranks import Ranks

Handler = Callable[[int, FrameType | None], Any]


class SignalsBetweenSteps(pl.Callback):
    """Takes the place of Lightning's handlers, takes note of signals, and calls those handlers after a training batch.

    It does so for SLURM's requeue signal where Lightning requeues jobs, and for SIGTERM where there are several
    processes. After a signal to any rank, all ranks call their handlers. A handler of the user's own is left alone.

    A checkpoint is thus saved when the step, and a validation if one is running, are done: SLURM has to give notice as
    long before as that takes (``sbatch --signal=SIGUSR1@300``).

    Args:
        ranks: Gives the processes of the job, once they have joined.
    """

    def __init__(self, ranks: Callable[[], Ranks]):
        self._ranks = ranks
        self._noted: set[int] = set()
        self._before: dict[int, Any] = {}
        """The signals to wait for, and their handlers before Lightning's."""
        self._handlers: dict[int, Handler] = {}
        """Lightning's handlers, of the signals that this callback has taken over."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out which signals matter; Lightning's handlers come after this hook."""
        self._noted.clear()
        self._handlers.clear()
        self._before = {number: signal.getsignal(number) for number in _signals(trainer)}

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over."""
        self._take_over()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over, where there was no validation before."""
        self._take_over()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Act on the signals of all ranks."""
        if not self._handlers:
            return
        for number in sorted(set().union(*self._ranks().gather(self._noted.copy))):
            self._noted.discard(number)
            self._handlers[number](number, None)

    def _take_over(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Lightning has installed no handlers either
        for number, before in self._before.items():
            handler = signal.getsignal(number)
            if number not in self._handlers and callable(handler) and handler is not before:
                self._handlers[number] = handler
                signal.signal(number, lambda number, frame: self._noted.add(number))


def _signals(trainer: pl.Trainer) -> list[int]:
    environment = trainer._accelerator_connector.cluster_environment  # where Lightning's own handlers look
    signals = [signal.SIGTERM] if trainer.world_size > 1 else []
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue and environment.requeue_signal:
        signals.append(environment.requeue_signal)
    return [int(number) for number in signals]
