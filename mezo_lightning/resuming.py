"""A run's own log: begun, checked and taken up again; rank zero keeps it, and all ranks know what they need of it.

A run is only ever resumed into its own log. The base weights alone do not tell two runs apart: those of two seeds, or
of two learning rates, start from the same. Steps that the log has beyond the checkpoint are not measured anew but
repeated from the log, one by one in the order of the data, so that schedules, validations and callbacks see them too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from mezo_lightning import estimators
from mezo_lightning.completers import ChooseOption
from mezo_lightning.encoding import Encoding
from mezo_lightning.generation import Generate
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.objectives import CrossEntropy, PreferenceObjective, RewardObjective
from mezo_lightning.optimizer import MeZO
from mezo_lightning.processes.ranks import Ranks
from mezo_lightning.rewarding.settings import Reward
from mezo_lightning.steps import Step
from mezo_lightning.trajectory import Header, Trajectory
from mezo_lightning.transforms import Chain, Clip, Identity, Sign, Standardize

# A module that was built in Python keeps its parts in the checkpoint. They are data and no code, so that torch may load
# them with weights_only=True, its default. A reward that is a function of the user's needs weights_only=False.
torch.serialization.add_safe_globals(
    [
        *(vars(estimators)[name] for name in estimators.__all__),
        *(Chain, ChooseOption, Clip, CrossEntropy, Encoding, Generate, Identity, PreferenceObjective, Pretrained),
        *(Reward, RewardObjective, Sign, Standardize),
    ]
)


@dataclass(frozen=True)
class Lineage:
    """The steps that led to some weights."""

    steps: int = 0
    """How many."""
    digest: str = ""
    """A hash of them and of the weights that they started from."""

    @classmethod
    def of(cls, trajectory: Trajectory, steps: int) -> Lineage:
        """The first ``steps`` steps of a trajectory; all of them where there are fewer."""
        content = [(step.terms, step.decays, *step.rates) for step in islice(trajectory, steps)]
        digest = hashlib.blake2b(repr((trajectory.header.fingerprint, content)).encode(), digest_size=16)
        return cls(len(content), digest.hexdigest())


class AtTheEnd(Callback):
    """Calls a function when a fit ends, in good order or not: Lightning tears no module down after an exception.

    Args:
        function: Is told whether the fit ended in good order.
    """

    def __init__(self, function: Callable[[bool], None]):
        self._function = function

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """It did."""
        self._function(True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """It did not."""
        self._function(False)


class RunLog:
    """The trajectory in a run's folder.

    Args:
        folder: The run's folder; only rank zero looks into it.
        ranks: The processes of the job.
        checkpoint: What the run is resumed from; None for a new run.
    """

    def __init__(self, folder: Path, ranks: Ranks, checkpoint: str | None):
        self.path = folder / "trajectory.bin"
        self.checkpoint = checkpoint
        self.lineage = Lineage()
        """Of the checkpoint last read; the trajectory's own, once it is closed."""
        self.fingerprint: int | None = None
        """Of the tuned weights in that checkpoint, where it says."""
        self._frozen: int | None = None
        self._ranks = ranks
        self._trajectory: Trajectory | None = None
        self._tail: Sequence[Step] = ()

    def check(self) -> None:
        """Refuse a folder that is another run's; nothing is changed."""
        self._frozen, *_ = self._ranks.gather(lambda: self._check() if self._ranks.rank == 0 else None)

    def check_weights(self, header: Header) -> None:
        """Refuse weights that differ between ranks, or from those that the checkpoint was saved with, after ``check``.

        Args:
            header: Of the weights that there are now.

        Raises:
            ValueError: If they are others.
        """
        # Else the samples would be those of several models.
        everywhere = self._ranks.gather(lambda: (header.fingerprint, header.frozen))
        for rank, found in enumerate(everywhere):
            if found != everywhere[0]:
                kind = "tuned" if found[0] != everywhere[0][0] else "frozen"
                raise ValueError(
                    f"the {kind} weights of rank {rank} are not those of rank 0: give every machine the same base "
                    "model, and call seed_everything before weights are drawn (adapters, a model from its config)"
                )
        if self.fingerprint not in (None, header.fingerprint):
            raise ValueError(
                f"the weights in {self.checkpoint} are not those that were saved: the file is damaged, or was changed; "
                "resume from an earlier checkpoint"
            )
        if self._frozen not in (None, header.frozen):
            raise ValueError(
                f"the frozen weights are not those of the run in {self.path}: the base model or {self.checkpoint} was "
                "changed; resume with the base model that the run began with, or from an earlier checkpoint"
            )

    def begin(self, optimizer: MeZO, header: Header, steps: int, rewind: bool) -> None:
        """Start the log, or take it up again; from now on the optimizer writes to it.

        Args:
            optimizer: On every rank; only rank zero's gets the log.
            header: Describes the run and the weights that there are now.
            steps: How many steps the weights have made.
            rewind: Forget the steps that come after these, instead of keeping them to be repeated.
        """
        # An update that remembers has to see estimates, of which the log has only the steps.
        rewind = rewind or optimizer.update is not None
        tails = self._ranks.gather(lambda: self._on_rank_zero(lambda: self._open(header, steps, rewind)))
        self._tail = tails[0] or ()
        optimizer.trajectory = self._trajectory

    def recorded(self, number: int) -> Step | None:
        """The step of that number, where the log of a resumed run has it already."""
        for step in self._tail:
            if step.number == number:
                return step
        return None

    def lineage_of(self, steps: int) -> Lineage:
        """What a checkpoint has to know of the log; meaningful on rank zero."""
        return self.lineage if self._trajectory is None else Lineage.of(self._trajectory, steps)

    def close(self, optimizer: MeZO, steps: int, *, finished: bool) -> None:
        """Close the file, all of which is on disk already; checkpoints may still be saved.

        Args:
            optimizer: The optimizer that writes to it.
            steps: How many steps the weights have made.
            finished: Whether the run ended in good order, so that whatever the log has beyond is no part of it.
        """
        if self._trajectory is None:
            return
        if finished and steps < len(self._trajectory):
            self._trajectory.truncate(steps)
        self.lineage = Lineage.of(self._trajectory, steps)
        self._trajectory.close()
        self._trajectory = optimizer.trajectory = None

    def _on_rank_zero(self, action: Callable[[], Sequence[Step] | None]) -> Sequence[Step] | None:
        return action() if self._ranks.rank == 0 else None

    def _check(self) -> int | None:
        """The fingerprint of the frozen weights, where there is a log and it tells."""
        if self.checkpoint is None:
            if self.path.exists():
                raise FileExistsError(
                    f"{self.path} is the trajectory of an earlier run: give this one a folder of its own (run_dir, or "
                    "Trainer(default_root_dir=...)), or resume the earlier one with ckpt_path"
                )
            return None
        with closing(Trajectory.open(self.path)) as trajectory:
            if Lineage.of(trajectory, self.lineage.steps) != self.lineage:
                raise ValueError(
                    f"{self.path} is not the trajectory of the checkpoint {self.checkpoint}: resume a run in its own "
                    "folder (run_dir, or Trainer(default_root_dir=...))"
                )
            return trajectory.header.frozen

    def _open(self, header: Header, steps: int, rewind: bool) -> Sequence[Step]:
        if self.checkpoint is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._trajectory = Trajectory.create(self.path, header)
            return ()
        self._trajectory = Trajectory.open(self.path, append=True)
        if rewind or steps > len(self._trajectory):
            self._trajectory.truncate(steps)  # which complains if there are fewer
        return [self._trajectory[number] for number in range(steps, len(self._trajectory))]


def check_whole(checkpoint: Mapping[str, Any], path: str | None) -> None:
    """Refuse to resume from a checkpoint that has weights only."""
    if "optimizer_states" not in checkpoint:
        raise ValueError(
            f"ckpt_path={path} holds weights only (save_weights_only: true), which is enough to validate, test, "
            "predict and export, but not to resume from"
        )


def check_dtype_of(model: nn.Module, dtype: torch.dtype) -> None:
    """Refuse a checkpoint of another dtype than the model's."""
    found = next(model.parameters()).dtype
    if found != dtype:
        raise ValueError(f"the checkpoint's weights are {dtype}, this model's are {found}; set trainer.precision")
