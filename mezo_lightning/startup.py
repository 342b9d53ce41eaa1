"""Before the first step: does every kind of trainable parameter move the model's output?

Weight merging in eval mode, a cache of fused weights or a layer that is never used make a perturbation vanish without a
sound: the run then trains nothing, or less than it says. (loralib 0.1.2 merges adapters in eval mode; results published
with MeZO on LoRA are thought to suffer from it.)
"""

from __future__ import annotations

import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mezo_lightning.encoding import Encoder
from mezo_lightning.evaluators import Evaluator
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.samplers import Gaussian
from mezo_lightning.steps import Point

if TYPE_CHECKING:
    from mezo_lightning.data.batch import Batch
    from mezo_lightning.models.pretrained import CausalLM
    from mezo_lightning.objectives import BoundObjective
    from mezo_lightning.sharding.placement import Placement


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
    for name, parameter in space.parameters.items():
        kinds[_kind(name)].append((name, parameter))
    for kind, named in kinds.items():
        part = ParameterSpace.of(named, [0] * len(named), Gaussian(), "stochastic")
        # So large a step that 16-bit weights cannot hide it; nothing is kept of it.
        points = (Point(), Point(((0, 2.0**-4),)))
        outputs: list[Tensor] = []
        make_evaluator(part)(lambda outputs=outputs: _collect(outputs, output()))(points)
        if torch.equal(*outputs):
            raise ValueError(
                f"perturbing the trainable parameters {kind} ({len(named)} of them) does not change the model's "
                "output, so they would never be tuned: are they merged or cached in eval mode, or not used at all? "
                "Freeze them (requires_grad = False) or mend the model; model.startup_checks: false skips this check"
            )


@torch.inference_mode()
def check_objective(objective: BoundObjective, model: CausalLM, placement: Placement, batch: Batch) -> None:
    """Measure one real batch, on one rank: a reward may cost money.

    Args:
        objective: At work on the model.
        model: The model.
        placement: Where its weights are.
        batch: Some rows.
    """
    with placement.present(model):
        placement.ranks.together(lambda: objective.startup(batch) if placement.ranks.rank == 0 else None)


@torch.inference_mode()
def logits(model: CausalLM, encoder: Encoder, prompts: Sequence[str]) -> Tensor:
    """The model's output on some prompts: [N, tokens, vocabulary].

    Args:
        model: A causal LM.
        encoder: Turns prompts into tokens.
        prompts: Any text.
    """
    inputs = encoder.pad([encoder.prompt(prompt, reserve=1) for prompt in prompts], model.device)
    return model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits


@contextmanager
def fp32_by_default() -> Iterator[None]:
    """Undo Lightning's default dtype of bf16-true and 16-true, in which rewards would be computed otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def silence_lightning() -> None:
    """Hush Lightning's warnings of what is so on purpose."""
    for message in (
        r"Found \d+ module\(s\) in eval mode",  # dropout would be noise between probes
        "Using ModelCheckpoint with manual optimization",  # it saves the weights after a step
        ".*when logging on epoch level in distributed setting",  # all ranks log the same values
    ):
        warnings.filterwarnings("ignore", message=message)


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", re.sub(r"\.(lora_|[^.]*$).*", "", name))


def _collect(outputs: list[Tensor], output: Tensor) -> Tensor:
    outputs.append(output.clone())
    return torch.zeros(())
