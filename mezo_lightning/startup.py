"""Before the first step: does every kind of trainable parameter move the model's output?

Weight merging in eval mode, a cache of fused weights or a layer that is never used make a perturbation vanish without a
sound: the run then trains nothing, or less than it says. (loralib 0.1.2 merges adapters in eval mode; results published
with MeZO on LoRA are thought to suffer from it.)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from mezo_lightning.evaluators import Evaluator
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.steps import Point


def check_every_kind_counts(
    space: ParameterSpace, make_evaluator: Callable[[ParameterSpace], Evaluator], output: Callable[[], Tensor]
) -> None:
    """Perturb the parameters kind by kind and see whether the output changes.

    A kind is the parameters of one module, over all layers; the parts of one adapter count as one, because LoRA's A
    does nothing as long as its B is zero. One dead layer among many, or a dead bias beside a live weight, is not seen.

    Args:
        space: The trainable parameters.
        make_evaluator: Makes the run's kind of evaluator for some of the parameters.
        output: Runs the model on a fixed input and returns its logits.

    Raises:
        ValueError: If a kind of parameters changes nothing.
    """
    kinds = defaultdict(list)
    for piece in space.slices:
        kinds[_kind(piece.info.name)].append(piece)
    for kind, pieces in kinds.items():
        named = [(piece.info.name, piece.parameter) for piece in pieces]
        part = ParameterSpace.of(named, [0] * len(named), space.sampler, "stochastic")
        # So large a step that 16-bit weights cannot hide it; nothing is kept of it.
        points = (Point(), Point(((0, 2.0**-4),)))
        outputs: list[Tensor] = []
        make_evaluator(part)(lambda outputs=outputs: _collect(outputs, output()))(points)
        if torch.equal(*outputs):
            raise ValueError(
                f"perturbing the trainable parameters {kind} ({len(pieces)} of them) does not change the model's "
                "output, so they would never be tuned: are they merged or cached in eval mode, or not used at all? "
                "Freeze them (requires_grad = False) or mend the model; model.startup_checks: false skips this check"
            )


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", re.sub(r"\.(lora_|[^.]*$).*", "", name))


def _collect(outputs: list[Tensor], output: Tensor) -> Tensor:
    outputs.append(output.clone())
    return torch.zeros(())
