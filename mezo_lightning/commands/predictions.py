"""``mezo predict`` writes what the model answers: one JSON line a row."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from mezo_lightning.data import PromptDataModule
from mezo_lightning.objectives import BoundObjective
from mezo_lightning.reporting import terminal

log = logging.getLogger(__name__)

FILE = "predictions.jsonl"


class PredictionCheck(Callback):
    """Finds whatever cannot be completed before the first row is, and says if there will be no metrics.

    Args:
        objective: Gives the objective that will predict, once there is one.
    """

    def __init__(self, objective: Callable[[], BoundObjective]):
        self._objective = objective

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at all rows."""
        data: Any = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)
        if not isinstance(data, PromptDataModule):
            return
        rows, objective = data.predict_dataloader().rows, self._objective()
        lack = objective.lacks(rows)
        if lack is not None and trainer.is_global_zero:
            log.warning("predictions have no metrics: %s", lack)
        objective.check(rows, measured=lack is None)


class PredictionWriter(BasePredictionWriter):
    """Writes predictions.jsonl into the run folder, batch by batch."""

    def __init__(self) -> None:
        super().__init__("batch")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Append a batch; the first one begins a new file."""
        if not trainer.is_global_zero:  # all ranks know all rows
            return
        rows: list[dict[str, Any]] = prediction
        path = Path(trainer.default_root_dir) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a" if batch_idx else "w", encoding="utf-8") as file:
            for row in rows:
                metrics = {name: value if math.isfinite(value) else None for name, value in row["metrics"].items()}
                file.write(json.dumps({**row, "metrics": metrics}, allow_nan=False) + "\n")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        if trainer.is_global_zero:
            terminal.write(f"Predictions: {Path(trainer.default_root_dir) / FILE}")
