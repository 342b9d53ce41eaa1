"""What a checkpoint must know to be taken up again: its trajectory, and which of our classes it may hold.

A run is only ever resumed into its own log. The base weights alone do not tell two runs apart: those of two seeds, or
of two learning rates, start from the same.
"""

from __future__ import annotations

import hashlib
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mezo_lightning.completers import ChooseOption
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import CentralDifference
from mezo_lightning.generation import Generate
from mezo_lightning.models import Pretrained
from mezo_lightning.objectives import CrossEntropy, RewardObjective
from mezo_lightning.trajectory import Trajectory
from mezo_lightning.transforms import Chain, Clip, Identity, Sign, Standardize

# A module that was built in Python keeps its parts in the checkpoint. They are data and no code, so that torch may load
# them with weights_only=True, its default. A reward that is a function of the user's needs weights_only=False.
torch.serialization.add_safe_globals(
    [
        *(CentralDifference, Chain, ChooseOption, Clip, CrossEntropy, Encoding, Generate),
        *(Identity, Pretrained, RewardObjective, Sign, Standardize),
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
        content = [(step.terms, step.decays) for step in islice(trajectory, steps)]
        digest = hashlib.blake2b(repr((trajectory.header.fingerprint, content)).encode(), digest_size=16)
        return cls(len(content), digest.hexdigest())


def check_new(path: Path) -> None:
    """Refuse to start a run over an earlier one.

    Args:
        path: Where the new run's trajectory is to be.
    """
    if path.exists():
        raise FileExistsError(
            f"{path} is the trajectory of an earlier run: give this one a folder of its own (run_dir, or "
            "Trainer(default_root_dir=...)), or resume the earlier one with ckpt_path"
        )


def check_resumed(path: Path, checkpoint: str, lineage: Lineage) -> None:
    """Refuse to resume into the folder of another run; nothing is changed.

    Args:
        path: The trajectory in the folder.
        checkpoint: Name of the checkpoint, for the message.
        lineage: What the checkpoint says of its own trajectory.
    """
    with closing(Trajectory.open(path)) as trajectory:
        if Lineage.of(trajectory, lineage.steps) != lineage:
            raise ValueError(
                f"{path} is not the trajectory of the checkpoint {checkpoint}: resume a run in its own folder "
                "(run_dir, or Trainer(default_root_dir=...))"
            )
