"""How far tuning has moved a model from its base, on the very tokens that it writes: what ``beta`` weighs.

Where an adapter is tuned, the base is still there: the same model with the adapter switched off. So both can be asked
for the probability of what was written, without a second copy of any weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mezo_lightning.completers import Completions
from mezo_lightning.encoding import Encoder
from mezo_lightning.evaluators import Samples
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.models.kinds import is_masked
from mezo_lightning.models.pretrained import base_model
from mezo_lightning.processes.ranks import Lockstep, Ranks
from mezo_lightning.scoring import Scorer

if TYPE_CHECKING:
    from peft import PeftModel

    from mezo_lightning.models.pretrained import CausalLM

KLEstimator = Literal["k1", "k3"]
_OVERWRITTEN = (
    "beta={} needs the base model beside the tuned one, and tuning {} overwrites it: tune an adapter alone, such as "
    "model.pretrained.adapter: {{peft_type: LORA, r: 8, target_modules: [q_proj, v_proj]}}, or set beta: 0"
)


class Divergence:
    """The divergence of a tuned adapter from its base, on completions: two teacher-forced forwards a call.

    With ``r = log p_tuned - log p_base`` of a token that was written, a sample's value is the mean over its tokens of
    ``r`` (k1) or ``exp(-r) - 1 + r`` (k3; Schulman, 2020, "Approximating KL divergence"). Both are estimates of the KL
    divergence where completions are samples at temperature 1. k3 is 0 where the two agree and positive elsewhere; k1
    may be negative, and pays for less confidence in what is written anyway, as in greedy decoding.

    Both forwards are made at the weights that the model has when called, so at a probe ``p_tuned`` is the probe's.
    Nothing is remembered of the base: sums in another batch round otherwise, and a resumed run would differ.

    Args:
        model: The model, with an adapter; run without temperature or truncation of its distribution.
        encoder: Encodes prompts for it.
        beta: The weight of the divergence, in what is minimised.
        estimator: Which of the two.
        reserve: Tokens that prompts were left room for when they were completed; None for the completion's own.

    Raises:
        ValueError: If there is no adapter, it cannot be switched off, or weights of the base are tuned as well.
    """

    def __init__(
        self, model: CausalLM, encoder: Encoder, *, beta: float, estimator: KLEstimator, reserve: int | None = None
    ):
        self._model = _with_a_base(model, beta)
        self._encoder = encoder
        self._beta = beta
        self._estimator: KLEstimator = estimator
        self._reserve = reserve
        self._scorer = Scorer(model, encoder)

    def check_ranks(self, ranks: Ranks) -> None:
        """Refuse ranks that have to run the same layers at the same time, as one without the adapter would not.

        Raises:
            ValueError: If weights are gathered layer by layer.
        """
        if isinstance(ranks, Lockstep):
            raise ValueError(
                f"beta={self._beta} switches the adapter off on each process by itself, and with zero3_inference and "
                "gather: layer all of them have to run the same layers: use gather: whole, or the strategy replicated"
            )

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], said: Completions) -> Tensor:
        """Fp64 [N], on the CPU, for N prompts and what was written to each."""
        rows = [(*self._prompt(prompt, len(ids)), *ids) for prompt, ids in zip(prompts, said.ids, strict=True)]
        lengths = [len(ids) for ids in said.ids]
        tuned = self._scorer.log_probs(rows, lengths)
        with without_adapter(self._model):
            base = self._scorer.log_probs(rows, lengths)
        ratios = [one - other for one, other in zip(tuned, base, strict=True)]
        terms = ratios if self._estimator == "k1" else [torch.expm1(-ratio) + ratio for ratio in ratios]
        return torch.stack([each.mean() for each in terms]).cpu()

    def penalised(self, samples: Samples, divergence: Tensor) -> Samples:
        """Samples with the penalty as one more component, where they have any, and with the metric ``kl``.

        Args:
            samples: N samples.
            divergence: Of each, see ``__call__``.
        """
        return replace(
            samples,
            values=torch.cat([samples.values, self._beta * divergence[:, None]], -1),
            valid=torch.cat([samples.valid, samples.valid.any(-1, keepdim=True)], -1),
            metrics={**samples.metrics, "kl": divergence},
        )

    def _prompt(self, prompt: str, length: int) -> tuple[int, ...]:
        return self._encoder.prompt(prompt, reserve=length if self._reserve is None else self._reserve)


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[None]:
    """Switch a model's adapter off; Ctrl-C waits until it is on again.

    Args:
        model: The model. PEFT freezes its adapter meanwhile and makes all of it trainable again; here it gets back
            what was trainable of it.
    """
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with uninterrupted() as interruptible, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Careful, disabling adapter layers with bias")  # _with_a_base knows better
        try:
            with model.disable_adapter(), interruptible:
                yield
        finally:
            for name, parameter in model.named_parameters():
                parameter.requires_grad = trainable[name]


def check_adapter(adapter: object, beta: float) -> None:
    """Refuse a penalty where there will be no adapter, before the model is loaded.

    Args:
        adapter: The setting ``pretrained.adapter``.
        beta: Weight of the penalty.

    Raises:
        ValueError: If there is a penalty and no adapter.
    """
    if beta and adapter is None:
        raise ValueError(_OVERWRITTEN.format(beta, "the model itself"))


def _with_a_base(model: CausalLM, beta: float) -> PeftModel:
    if is_masked(base_model(model)):
        raise ValueError(
            f"beta={beta} needs a model that writes, and a {type(base_model(model)).__name__} does not: set beta: 0"
        )
    if isinstance(model, PreTrainedModel):
        raise ValueError(_OVERWRITTEN.format(beta, "the model itself"))
    kind = str(model.active_peft_config.peft_type).removeprefix("PeftType.")
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(
            f"beta={beta} needs an adapter that changes weights and can be switched off, and {kind} adds virtual "
            "tokens: use LORA, or set beta: 0"
        )
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        with without_adapter(model):  # which freezes what belongs to the adapter
            left = sorted(n for n, parameter in model.named_parameters() if parameter.requires_grad and n in trainable)
    except NotImplementedError as error:
        raise ValueError(
            f"beta={beta} needs an adapter that can be switched off, and {kind} cannot be: use LORA, or set beta: 0"
        ) from error
    if left:
        raise ValueError(_OVERWRITTEN.format(beta, f"{len(left)} of its own weights ({left[0]}, ...)"))
    return model
