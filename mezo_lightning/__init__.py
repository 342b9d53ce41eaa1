"""Fine-tune any Hugging Face causal LM with forward passes only (MeZO), against any scalar reward, under Lightning.

The names below are the public ones; the torch-only core is imported at once, the rest when it is first used, so that
``MeZO`` in a plain PyTorch loop needs neither Lightning nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from mezo_lightning.dense import DenseAdam, DenseMomentum
from mezo_lightning.estimators import (
    FZOO,
    GRZO,
    CentralDifference,
    Comparison,
    Cone,
    ForwardDifference,
    GreedyDirection,
    GuidingVector,
    Population,
    Ranking,
)
from mezo_lightning.evaluators import Copy, Samples
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rowwise.evaluator import Rowwise
from mezo_lightning.samplers import Gaussian, Rademacher, derive_seed
from mezo_lightning.scaled import Scaled, ScaledByNorm
from mezo_lightning.sparse import Sparse
from mezo_lightning.steps import GradientEstimate, Point, Step
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.trajectory import Header, Trajectory, replay
from mezo_lightning.transforms import Chain, Clip, Identity, Sign, Standardize
from mezo_lightning.updates import Momentum, ScalarAdam, Trail

if TYPE_CHECKING:
    from mezo_lightning.completers import ChooseOption
    from mezo_lightning.data import PromptDataModule
    from mezo_lightning.encoding import Encoding
    from mezo_lightning.generation import Generate
    from mezo_lightning.models.pretrained import Pretrained
    from mezo_lightning.module import MeZOModule
    from mezo_lightning.objectives import CrossEntropy, PreferenceObjective, RewardObjective
    from mezo_lightning.rewarding.settings import Reward

_LAZY = {
    "ChooseOption": "completers",
    "CrossEntropy": "objectives",
    "Encoding": "encoding",
    "Generate": "generation",
    "MeZOModule": "module",
    "PreferenceObjective": "objectives",
    "Pretrained": "models.pretrained",
    "PromptDataModule": "data",
    "Reward": "rewarding.settings",
    "RewardObjective": "objectives",
}

__all__ = [
    "FZOO",
    "GRZO",
    "CentralDifference",
    "Chain",
    "ChooseOption",
    "Clip",
    "Comparison",
    "Cone",
    "Copy",
    "CrossEntropy",
    "DenseAdam",
    "DenseMomentum",
    "Encoding",
    "Flipout",
    "ForwardDifference",
    "Gaussian",
    "Generate",
    "GradientEstimate",
    "GreedyDirection",
    "GuidingVector",
    "Header",
    "Identity",
    "LeafScratch",
    "LowRank",
    "MeZO",
    "MeZOModule",
    "Momentum",
    "Point",
    "Population",
    "PreferenceObjective",
    "Pretrained",
    "PromptDataModule",
    "Rademacher",
    "Ranking",
    "Reward",
    "RewardObjective",
    "Rowwise",
    "Samples",
    "ScalarAdam",
    "Scaled",
    "ScaledByNorm",
    "Sign",
    "Sparse",
    "Standardize",
    "Step",
    "Subset",
    "Trail",
    "Trajectory",
    "derive_seed",
    "replay",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
