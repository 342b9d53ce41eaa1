"""Loggers that write nothing until a run has passed all checks.

Lightning opens its loggers before it reads data, model or checkpoint. ``TensorBoardLogger`` makes a file then, and
``CSVLogger`` deletes the one that is there: a resume that is refused would cost the run its metrics.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger


class _Late(Logger):
    """Goes in front of a logger that writes files."""

    begun = False

    @property
    def experiment(self) -> Any:
        """What writes the files; before the run has begun, something that takes every call and does nothing."""
        return super().experiment if self.begun else DummyLogger().experiment  # pyright: ignore[reportAttributeAccessIssue]

    def save(self) -> None:
        if self.begun:
            super().save()


class LateCSVLogger(_Late, CSVLogger):
    """Lightning's CSVLogger, once the run has begun."""


class LateTensorBoardLogger(_Late, TensorBoardLogger):
    """Lightning's TensorBoardLogger, once the run has begun."""


class BeginLogs(Callback):
    """Lets the trainer's late loggers write. List it before the callbacks that log."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, in a run that starts from the base model and validates it first."""
        _begin(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, in any other run."""
        _begin(trainer)


def _begin(trainer: Trainer) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, _Late):
            logger.begun = True
