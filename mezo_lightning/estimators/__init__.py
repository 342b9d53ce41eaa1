"""Gradient estimates from values, or comparisons, alone: which points to ask for, and what to make of the answers.

An estimator never calls a model. It is handed ``evaluate``, which takes a round of points and returns their values,
and a seed, from which it derives the seeds of its directions; what it returns is a few scalars.
"""

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.central import CentralDifference
from mezo_lightning.estimators.comparison import Comparison
from mezo_lightning.estimators.cone import Cone
from mezo_lightning.estimators.fzoo import FZOO
from mezo_lightning.estimators.greedy import GreedyDirection
from mezo_lightning.estimators.grzo import GRZO
from mezo_lightning.estimators.guided import GuidingVector
from mezo_lightning.estimators.one_sided import ForwardDifference
from mezo_lightning.estimators.population import Population
from mezo_lightning.estimators.ranking import Ranking

__all__ = [
    "FZOO",
    "GRZO",
    "CentralDifference",
    "Comparison",
    "Cone",
    "Estimator",
    "ForwardDifference",
    "GreedyDirection",
    "GuidingVector",
    "Population",
    "Ranking",
]
