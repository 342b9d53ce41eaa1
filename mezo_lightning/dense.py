"""Update rules with dense moments: tensors beside the weights, in fp32 and cut up exactly as the weights are.

    g = sum_i c_i z(s_i)        theta_k <- decay_k * theta_k - rate_k * direction(g, moments)

Such a rule sees the sum of a step's directions, one element at a time and with every operation rounded once: the same
bits on any device and for any cut into shards and chunks. A step records the terms of its estimate, and its rates;
moments are zero before step 0, so a replay makes them again.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mezo_lightning.steps import GradientEstimate, round_fp32
from mezo_lightning.updates import Memory, Update, check_fraction, check_zeta


class Dense(Update):
    """A rule that keeps fp32 moments beside every weight that this process holds, and in checkpoints.

    It goes with any sampler, for no direction is made a second time. Where a direction is 0, as with ``Sparse`` and
    ``Subset``, the gradient is 0, but the moments of earlier steps still move the weight: as in torch, where a masked
    gradient does not stop momentum.
    """

    @property
    def reach(self) -> int:
        return 1

    @property
    @abstractmethod
    def moments(self) -> int:
        """How many fp32 numbers there are beside each weight."""

    def advance(self, memory: Memory, estimate: GradientEstimate) -> tuple[Memory, GradientEstimate]:
        return replace(memory, count=memory.count + 1), estimate

    def rate(self, memory: Memory) -> float:
        """What the learning rate is multiplied by, once an estimate has been taken in."""
        del memory
        return 1.0

    @abstractmethod
    def direction(self, state: Tensor, gradient: Tensor) -> Tensor:
        """Take in the gradient of some weights.

        Args:
            state: Their moments, fp32 [n, moments]; written to.
            gradient: What the estimate makes of it, fp32 [n].

        Returns:
            Fp32 [n], which is not to be written to: what moves the weights, times minus the rate.
        """

    def move(self, values: Tensor, gradient: Tensor, state: Tensor, rate: float) -> None:
        """Take in the gradient of some weights, and move them.

        Args:
            values: The weights, fp32 [n]; written to.
            gradient: See ``direction``.
            state: See ``direction``.
            rate: The step's, for their parameter group; at 0 they keep their bytes.
        """
        direction = self.direction(state, gradient)
        if rate:
            values.sub_(direction.mul(rate))

    def begin(self, number: int, weights: Sequence[Tensor], known: list[Tensor] | None) -> list[Tensor]:
        """The moments that a step finds: zeros for the first one of a run.

        Args:
            number: How many steps there were before it.
            weights: All that this process holds, flat.
            known: The moments so far, [n, moments] for each of them; None where there are none.

        Raises:
            ValueError: If it is a later step, and there are none.
        """
        if number == 0:
            return [torch.zeros(w.numel(), self.moments, dtype=torch.float32, device=w.device) for w in weights]
        if known is None:
            raise ValueError(
                f"step {number} goes on with the moments of {self}, which are not known here: begin with step 0, on "
                "the base weights"
            )
        return known


@dataclass(frozen=True)
class DenseMomentum(Dense):
    """Heavy-ball momentum over all steps, at 4 bytes beside every weight.

    ``m_t = beta m_{t-1} + estimate_t``, and the step is ``-lr * m_t``: ``torch.optim.SGD(momentum=beta)``, its
    dampening 0. An estimate has in all ``1 / (1 - beta)`` times the effect that it has without momentum: divide the
    learning rate by as much. ``Momentum`` gives nearly the same without the memory, but makes all directions of its
    window at every update, and not with every sampler. With ``Sparse`` and ``Subset`` the moment also moves weights
    that the directions of a step leave out.

    The moment is in fp32, 4 bytes a weight: twice what bf16 weights take. Under ZeRO-3 each process has that of its
    piece, in memory and in its file of a checkpoint.
    """

    beta: float = 0.9
    """How much of the sum is left after a step, below 1."""

    def __post_init__(self) -> None:
        check_fraction("DenseMomentum", "beta", self.beta)

    @property
    def moments(self) -> int:
        return 1

    def direction(self, state: Tensor, gradient: Tensor) -> Tensor:
        return state[:, 0].mul_(round_fp32(self.beta)).add_(gradient)


@dataclass(frozen=True)
class DenseAdam(Dense):
    """Adam (Kingma and Ba, 2015, arXiv 1412.6980) on the estimates, at 8 bytes beside every weight.

    ::

        m_t = beta1 m_{t-1} + (1 - beta1) estimate_t
        v_t = beta2 v_{t-1} + (1 - beta2) estimate_t^2
        theta <- theta - lr * sqrt(1 - beta2^t) / (1 - beta1^t) * m_t / (sqrt(v_t) + zeta)

    the form that the end of the paper's section 2 gives: ``torch.optim.Adam``, but for zeta, which torch divides by
    ``sqrt(1 - beta2^t)``. The learning rate is about the change of a coordinate in a step. An estimate of few
    directions tells next to nothing of single coordinates: expect of v the mean over many steps, and compare with
    ``ScalarAdam``, which has one v for all weights and needs no memory. With ``Sparse`` and ``Subset`` the moments also
    move weights that the directions of a step leave out.

    Both moments are in fp32, 8 bytes a weight: four times what bf16 weights take. Under ZeRO-3 each process has those
    of its piece, in memory and in its file of a checkpoint.
    """

    beta1: float = 0.9
    """How much of the first moment is left after a step, below 1."""
    beta2: float = 0.999
    """How much of the second moment is left after a step, below 1."""
    zeta: float = 1e-8
    """Is added to the root of the second moment; the usual epsilon, which here is something else."""

    def __post_init__(self) -> None:
        check_fraction("DenseAdam", "beta1", self.beta1)
        check_fraction("DenseAdam", "beta2", self.beta2)
        check_zeta("DenseAdam", self.zeta)

    @property
    def moments(self) -> int:
        return 2

    def rate(self, memory: Memory) -> float:
        return math.sqrt(1.0 - self.beta2**memory.count) / (1.0 - self.beta1**memory.count)

    def direction(self, state: Tensor, gradient: Tensor) -> Tensor:
        first, second = state.unbind(1)
        # Each product and each sum by itself: what a device fuses, it rounds otherwise.
        first.mul_(round_fp32(self.beta1)).add_(gradient.mul(round_fp32(1.0 - self.beta1)))
        second.mul_(round_fp32(self.beta2)).add_(gradient.square().mul_(round_fp32(1.0 - self.beta2)))
        return first / second.sqrt().add_(round_fp32(self.zeta))


# -- on record ---------------------------------------------------------------------------------------------------------

_RULES: dict[str, type[Dense]] = {kind.__name__: kind for kind in (DenseMomentum, DenseAdam)}


def dense_as_dict(rule: Dense | None) -> dict[str, Any]:
    """A rule's name and settings, for JSON; empty for none."""
    if rule is None:
        return {}
    assert isinstance(rule, (DenseMomentum, DenseAdam)), rule
    return {"name": type(rule).__name__, **asdict(rule)}


def dense_from_dict(record: Mapping[str, Any]) -> Dense | None:
    """The inverse of ``dense_as_dict``; names of strangers are not imported.

    Raises:
        ValueError: If the name is unknown.
    """
    if not record:
        return None
    settings = dict(record)
    name = settings.pop("name")
    if name not in _RULES:
        raise ValueError(f"the trajectory's update {name!r} is unknown; known are {', '.join(_RULES)}")
    return _RULES[name](**settings)
