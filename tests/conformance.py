"""What combines with what: one declared table of parts, the pairs that are refused, and runs of any combination.

Five axes and the precision: which estimator, sampler, update, parameter space and evaluator. Whatever pair is not in
``REFUSED`` is supported, and is part of one of ``COMBINATIONS`` at least, over which the properties of
``unit/test_conformance.py`` run. A new part needs a line here, and a refusal where it does not go with another part.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import combinations
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModelForCausalLM, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from mezo_lightning.dense import DenseAdam, DenseMomentum
from mezo_lightning.estimators import (
    FZOO,
    GRZO,
    CentralDifference,
    Comparison,
    Cone,
    Estimator,
    ForwardDifference,
    GreedyDirection,
    GuidingVector,
    Population,
    Ranking,
)
from mezo_lightning.evaluators import Copy, Evaluation, Evaluator
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.models.adapters import with_adapter
from mezo_lightning.models.virtual_tokens import VirtualTokens
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rounding import RoundingName
from mezo_lightning.rowwise.evaluator import Rowwise
from mezo_lightning.rowwise.points import RowPoint, row_seed, running
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler, derive_seed
from mezo_lightning.scaled import Scaled, ScaledByNorm
from mezo_lightning.sparse import Sparse
from mezo_lightning.steps import GradientEstimate, Point
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.updates import Momentum, ScalarAdam, Trail

IDS = torch.tensor([0, 3, 1, 6, 2, 5])
TARGETS = torch.tensor([4, 0, 2, 1, 5, 3])
ROWS = len(IDS)
EPSILON = 2.0**-4


@dataclass(frozen=True)
class Rule:
    """An estimator, and what its docstring says of it."""

    estimator: Estimator
    rounds: tuple[int, ...]
    """Points in each round."""
    directions: int
    """Different directions in all of them, at the first step."""
    factor: float | None
    """The mean estimate of a linear objective is the gradient times this; None: it points along the gradient."""
    lr: float = 0.02
    """A rate at which a small quadratic is descended."""
    tie: Literal["zero", "skipped"] = "skipped"
    """What becomes of a step whose probes all have the same value."""
    further: int = 0
    """How many more directions every later step has."""


ESTIMATORS = {
    "mezo": Rule(CentralDifference(EPSILON), (2,), 1, 1.0, tie="zero"),
    "n-spsa": Rule(CentralDifference(EPSILON, 4), (8,), 4, 1.0, tie="zero"),
    "forward": Rule(ForwardDifference(EPSILON, 2), (3,), 2, 1.0, tie="zero"),
    "guided": Rule(GuidingVector(EPSILON, 4), (4, 2), 4, 2.10),
    "greedy": Rule(GreedyDirection(EPSILON, 4), (4, 2), 4, 1.55),
    "fzoo": Rule(FZOO(EPSILON, 4), (5,), 4, None, lr=0.1),
    "es": Rule(Population(EPSILON, 6), (6,), 6, None, lr=0.1),
    "ranked es": Rule(Population(EPSILON, 6, antithetic=True, fitness="centered_rank"), (6,), 3, None, lr=0.3),
    "comparison": Rule(Comparison(EPSILON, 2), (4,), 2, None, lr=0.1, tie="zero"),
    "ranking": Rule(Ranking(EPSILON, 4), (4,), 4, None, lr=0.1, tie="zero"),
    "cone": Rule(Cone(EPSILON), (2,), 1, None, tie="zero", further=1),
    "grzo": Rule(GRZO(EPSILON), (2,), ROWS, None, lr=0.1),
    "grzo, not normalised": Rule(GRZO(EPSILON, normalize=False), (2,), ROWS, 1.0, tie="zero"),
}
SAMPLERS: dict[str, Sampler] = {
    "gaussian": Gaussian(),
    "rademacher": Rademacher(),
    "lozo": LowRank(1, refresh_left=0, refresh_right=2),
    "eggroll": LowRank(2, refresh_left=0, refresh_right=0),
    "tezo": LowRank(2, core="diagonal", refresh_left=None, refresh_right=None),
    "subzero": LowRank(2, core="dense", refresh_left=2, refresh_right=2),
    "lezo": Subset(fraction=0.5),
    "bcd over lozo": Subset(LowRank(1, refresh_right=2), order="cyclic"),
    "flipout": Flipout(),
    "scaled": Scaled({"layers|lstm|prompt": 2.0, r"\.": 0.5}),
    "scaled lozo": Scaled({"layers|lstm|prompt": 0.5}, LowRank(1, refresh_left=0, refresh_right=2)),
    "by norm": ScaledByNorm(),
    "sparse": Sparse(fraction=0.5),
}
SHARES = {"lezo": 0.5, "bcd over lozo": 0.5, "scaled": 4.0, "scaled lozo": 0.25}
"""The mean estimate of a layer's gradient is the gradient times this: the time that the layer is active, for samplers
that leave some out (there are two layers), or the square of its scale."""
UPDATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.25},
    "decay towards the start": {"weight_decay": 0.25, "decay_towards": "start"},
    "momentum": {"update": Momentum(0.5, window=2)},
    "scalar adam": {"update": ScalarAdam(beta2=0.5)},
    "trail": {"update": Trail(0.5, window=2)},
    "scalar adam with momentum": {"update": ScalarAdam(0.5, 0.5, window=2), "weight_decay": 0.25},
    "dense momentum": {"update": DenseMomentum(0.5)},
    "dense adam": {"update": DenseAdam(0.5, 0.75), "weight_decay": 0.25},
}
"""Options of the optimizer."""
EVALUATORS: dict[str, Callable[[nn.Module, MeZO], Evaluator]] = {
    "copy": lambda model, optimizer: Copy(optimizer.space),
    "leaf scratch": lambda model, optimizer: LeafScratch(model, optimizer.space),
    "rowwise": lambda model, optimizer: Rowwise(model, optimizer.space, Copy(optimizer.space)),
}
PRECISIONS: dict[str, tuple[torch.dtype, RoundingName]] = {
    "fp32": (torch.float32, "stochastic"),
    "bf16": (torch.bfloat16, "stochastic"),
    "bf16 compensated": (torch.bfloat16, "compensated"),
    "fp16 master": (torch.float16, "master"),
}


# -- parameter spaces --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """An embedding, two layers and a head, which may be the embedding's own weight."""

    def __init__(self, head: Literal["own", "tied", "functional"] = "own", width: int = 4):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.layers = nn.ModuleList([nn.Linear(width, width + 1), nn.Linear(width + 1, width)])
        self.head = nn.Identity() if head == "functional" else nn.Linear(width, 7, bias=False)
        if isinstance(self.head, nn.Linear) and head == "tied":
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) if isinstance(self.head, nn.Linear) else F.linear(x, self.embed.weight)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(7, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids[None]))[0][0])


def adapted(model: Any, *, zero: bool = False) -> nn.Module:
    """With LoRA, whose B is 0 if ``zero``: that is PEFT's default."""
    return get_peft_model(model, LoraConfig(r=2, target_modules=["layers.0", "layers.1"], init_lora_weights=zero))


def of_codes(**options: Any) -> nn.Module:
    """A frozen model whose two layers are 4-bit codes."""
    bitsandbytes: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra quantised)")
    model = Net(width=16).requires_grad_(False)
    for number, layer in enumerate(model.layers):
        shape = layer.in_features, layer.out_features
        codes = bitsandbytes.nn.Linear4bit(*shape, compress_statistics=False, quant_type="nf4", **options)
        codes.load_state_dict(layer.state_dict())
        model.layers[number] = codes.requires_grad_(False).to("cpu")
    return model


def adapters_on_codes() -> nn.Module:
    """As transformers and peft do it: an adapter beside each layer of codes."""
    model: Any = of_codes(compute_dtype=torch.float32)
    model.is_loaded_in_4bit = True
    return adapted(model)


def scales_of_codes() -> nn.Module:
    """Only the scales of the codes are tuned: 5 each."""
    model = of_codes()
    from mezo_lightning.models.scales import add_scales  # needs bitsandbytes

    add_scales(model, "log_scales")
    for name, parameter in model.named_parameters():
        if name.endswith("log_scales"):
            nn.init.normal_(parameter, std=0.1)
    return model


def behind_virtual_tokens(kind: str) -> nn.Module:
    """A small language model behind two tokens that nobody wrote, as a run has it."""
    shared = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "init_std": 0.5, "max_position_embeddings": 8}
    config = OPTConfig(
        vocab_size=7,
        hidden_size=8,
        word_embed_proj_dim=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=8,
        **shared,
    )
    return with_adapter(OPTForCausalLM(config).eval(), {"peft_type": kind, "num_virtual_tokens": 2})


def biases_only() -> nn.Module:
    model = Net()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("bias")
    return model


def everything(model: nn.Module) -> Any:
    return model.named_parameters()


def two_groups(model: nn.Module) -> Any:
    """Layers at a rate of their own, before what comes first in the model."""
    named = list(model.named_parameters())
    return [
        {"params": [item for item in named if "layers" in item[0]], "lr": 0.01},
        {"params": [item for item in named if "layers" not in item[0]], "weight_decay": 0.5},
    ]


SPACES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Any]]] = {
    "full": (Net, everything),
    "two groups": (Net, two_groups),
    "biases": (biases_only, everything),
    "lora": (lambda: adapted(Net(), zero=True), everything),
    "lora on codes": (adapters_on_codes, everything),
    "scales": (scales_of_codes, everything),
    "prefix": (lambda: behind_virtual_tokens("PREFIX_TUNING"), everything),
    "prompt": (lambda: behind_virtual_tokens("PROMPT_TUNING"), everything),
    "lstm": (Recurrent, everything),
    "tied": (lambda: Net("tied"), everything),
    "tied by a function": (lambda: Net("functional"), everything),
}
"""A model, and the parameters of it that the optimizer is given."""

_CHANGING = ("lozo", "subzero", "lezo", "bcd over lozo", "flipout", "scaled lozo", "sparse")
_REPEATING = ("momentum", "trail", "scalar adam with momentum")
_ROWWISE = ("grzo", "grzo, not normalised")
REFUSED: dict[frozenset[str], str] = {
    frozenset(
        {"tied by a function", "leaf scratch"}
    ): r"'embed.weight' is used outside of the forward.*evaluator: copy",
    **{
        frozenset({space, sampler}): r"Subset\(blocks=.*\) is found in the name of no trainable parameter"
        for space in ("lstm", "prefix", "prompt")
        for sampler in ("lezo", "bcd over lozo")
    },
    **{
        frozenset({update, sampler}): r"applies the directions of earlier steps again, .* use Gaussian"
        for update in _REPEATING
        for sampler in _CHANGING
    },
    **{
        frozenset({"cone", update}): "estimator=Cone .* does not remember it: give the optimizer `update: Trail`"
        for update in UPDATES
        if update != "trail"
    },
    frozenset({"cone", "tezo"}): "with sampler=LowRank.* they share a factor: give LowRank refresh_left: 0",
    **{
        frozenset({update, precision}): r".* and rounding=.* both keep something beside the weights, and only one may"
        for update in ("decay towards the start", "dense momentum", "dense adam")
        for precision in ("bf16 compensated", "fp16 master")
    },
    **{
        frozenset({"rowwise", sampler}): "Rowwise needs the sampler Flipout"
        for sampler in SAMPLERS
        if sampler != "flipout"
    },
    **{
        frozenset({rule, sampler}): "estimator=GRZO .* cannot tell them apart: give the optimizer `sampler: Flipout`"
        for rule in _ROWWISE
        for sampler in SAMPLERS
        if sampler != "flipout"
    },
    **{
        frozenset({rule, evaluator}): "a direction for each row of the batch .GRZO., and this evaluator gives all rows"
        for rule in _ROWWISE
        for evaluator in ("copy", "leaf scratch")
    },
    **{
        frozenset({rule, space}): r"cannot have directions of their own"
        for rule in _ROWWISE
        for space in ("lstm", "scales", "prefix", "prompt")
    },
}
"""Pairs that cannot work, and what the error says."""
IMPLIED = {
    *(frozenset({part, update}) for part in (*_ROWWISE, "rowwise") for update in _REPEATING),
    *(frozenset({"cone", part}) for part in (*_CHANGING, "rowwise")),
}
"""Pairs that cannot work because one of the two needs a third part that the other one refuses."""


# -- combinations ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Combination:
    """A name on each axis."""

    estimator: str = "mezo"
    sampler: str = "gaussian"
    space: str = "full"
    update: str = "plain"
    precision: str = "fp32"
    evaluator: str = "copy"

    def __str__(self) -> str:
        return " | ".join(asdict(self).values())


AXES: dict[str, Mapping[str, Any]] = {
    "estimator": ESTIMATORS,
    "sampler": SAMPLERS,
    "space": SPACES,
    "update": UPDATES,
    "precision": PRECISIONS,
    "evaluator": EVALUATORS,
}
assert list(AXES) == [axis.name for axis in fields(Combination)]
Choice = tuple[str, str]
"""An axis and a name on it."""


def choices(combination: Combination) -> Iterator[Choice]:
    yield from asdict(combination).items()


def pairs() -> list[tuple[Choice, Choice]]:
    """Every pair of names on two axes."""
    return [
        ((first, one), (second, other))
        for first, second in combinations(AXES, 2)
        for one in AXES[first]
        for other in AXES[second]
    ]


def completed(chosen: Mapping[str, str], gain: Callable[[Choice, Mapping[str, str]], int]) -> Combination | None:
    """A combination with these parts; None where there is none.

    Args:
        chosen: A name on some of the axes.
        gain: How welcome a choice is beside others; the most welcome one that leads to something is taken.
    """
    if len(chosen) == len(AXES):
        return Combination(**chosen)
    axis = next(axis for axis in AXES if axis not in chosen)
    possible = [
        name for name in AXES[axis] if not any(frozenset({name, other}) in REFUSED for other in chosen.values())
    ]
    for name in sorted(possible, key=lambda name: -gain((axis, name), chosen)):
        found = completed({**chosen, axis: name}, gain)
        if found is not None:
            return found
    return None


def covering() -> list[Combination]:
    """As few combinations as a greedy choice finds, such that every supported pair is in one of them."""
    unsupported = REFUSED.keys() | IMPLIED
    missing = {frozenset(pair): None for pair in pairs() if frozenset(name for _, name in pair) not in unsupported}
    result = []
    while missing:
        found = completed(
            dict(next(iter(missing))),
            lambda choice, chosen: sum(frozenset({choice, other}) in missing for other in chosen.items()),
        )
        assert found is not None, next(iter(missing))
        result.append(found)
        for pair in combinations(choices(found), 2):
            missing.pop(frozenset(pair), None)
    return result


COMBINATIONS = covering()


def with_every_part() -> list[Combination]:
    """A few of them, in which every part has its turn: for what does not depend on pairs."""
    seen: set[Choice] = set()
    result = []
    for combination in COMBINATIONS:
        if not seen.issuperset(choices(combination)):
            seen.update(choices(combination))
            result.append(combination)
    return result


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of a combination, at its start: the same weights for the same space and precision."""

    of: Combination
    lr: float = 0.05
    device: torch.device | str = "cpu"
    points: list[tuple[Point, ...]] = field(default_factory=list)
    """Every round that was asked for."""

    def __post_init__(self) -> None:
        make, parameters = SPACES[self.of.space]
        dtype, rounding = PRECISIONS[self.of.precision]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model = make().to(dtype)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.view(-1)[1] = -0.0
        self.model.to(self.device)
        self.optimizer = MeZO(
            parameters(self.model),
            self.lr,
            sampler=SAMPLERS[self.of.sampler],
            rounding=rounding,
            **UPDATES[self.of.update],
        )
        self.estimator = ESTIMATORS[self.of.estimator].estimator
        self.objective: Callable[[], Any] = self.losses
        self.evaluator = EVALUATORS[self.of.evaluator](self.model, self.optimizer)

    def losses(self) -> Tensor:
        """One a sample."""
        return F.cross_entropy(self.logits(IDS.to(self.device)).float(), TARGETS.to(self.device), reduction="none")

    def logits(self, ids: Tensor) -> Tensor:
        """Of what comes after each id: [ids, 7]."""
        if not isinstance(self.model, PeftModelForCausalLM):
            return self.model(ids)
        tokens = VirtualTokens(self.model)
        texts = {"input_ids": ids[:, None], "attention_mask": torch.ones_like(ids)[:, None]}
        with running(range(len(ids))):
            return tokens.base(**tokens.in_front(texts)).logits[:, -1]

    def evaluate(self, points: Sequence[Point]) -> Evaluation:
        self.points.append(tuple(points))
        return self.evaluator(lambda: self.objective())(points)

    def estimate(self) -> GradientEstimate:
        """The estimate of the step that comes next."""
        estimator = self.estimator.knowing(self.optimizer)
        return estimator.estimate(self.evaluate, seed=derive_seed(3, self.optimizer.space.step_number()))

    def take(self, steps: int) -> None:
        """Make some steps."""
        for _ in range(steps):
            self.optimizer.step(estimate=self.estimate())

    def saved(self) -> bytes:
        """The tuned weights and the optimizer's state, as a file."""
        file = io.BytesIO()
        weights = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        torch.save({"model": weights, "optimizer": self.optimizer.state_dict()}, file)
        return file.getvalue()

    def load(self, saved: bytes) -> None:
        """Go on from there."""
        state = torch.load(io.BytesIO(saved), weights_only=True)
        assert not self.model.load_state_dict(state["model"], strict=False).unexpected_keys
        self.optimizer.load_state_dict(state["optimizer"])

    def tensors(self) -> list[Tensor]:
        """The tuned parameters, flat, in the order of positions: views."""
        return [piece.weights for piece in self.optimizer.space.slices]

    def weights(self) -> list[Tensor]:
        """A copy of them."""
        return [tensor.clone() for tensor in self.tensors()]


def seeds_of(point: Point) -> set[int]:
    """Of the directions along which a point lies."""
    if isinstance(point, RowPoint):
        return {row_seed(point.seed, row) for row in range(ROWS)}
    return {seed for seed, _ in point.terms}


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two lists of tensors have the same bytes; -0.0 is not 0.0."""
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )
