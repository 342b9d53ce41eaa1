"""What training minimises, sample by sample: a cross-entropy, a reward turned round, or nothing but comparisons."""

from mezo_lightning.objectives.base import BoundObjective, Objective
from mezo_lightning.objectives.cross_entropy import CrossEntropy
from mezo_lightning.objectives.preference import PreferenceObjective
from mezo_lightning.objectives.reward import RewardObjective

__all__ = ["BoundObjective", "CrossEntropy", "Objective", "PreferenceObjective", "RewardObjective"]
