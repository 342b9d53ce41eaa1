"""Directions that move small weights alone: against Sparse-MeZO in plain torch, in files, on pieces, and refused."""

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.dense import DenseMomentum
from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterSpace, Slice
from mezo_lightning.rounding import RoundingName
from mezo_lightning.sampler_records import sampler_from_dict
from mezo_lightning.samplers import Gaussian, Sampler, derive_seed
from mezo_lightning.scaled import Scaled
from mezo_lightning.shards import Shard
from mezo_lightning.sparse import Sparse
from mezo_lightning.steps import GradientEstimate, Point, Step
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.trajectory import Header, Trajectory, replay
from mezo_lightning.updates import Momentum

EPSILON = 2.0**-6
PIECE = Shard(torch.ones(8), (4, 4), 0)  # pyright: ignore[reportCallIssue]


class Net(nn.Module):
    """A matrix that is looked up, one that multiplies, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(9, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.embed(ids)))


def make_model(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def losses(model: nn.Module) -> Tensor:
    return (model(torch.arange(9)).float() - 1.0).square().mean(1)


def flat(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def thresholds_of(optimizer: MeZO) -> dict[str, float]:
    sampler = optimizer.space.sampler
    assert isinstance(sampler, Sparse)
    assert sampler.thresholds is not None
    return sampler.thresholds


def take_steps(model: nn.Module, optimizer: MeZO, count: int, leaf_scratch: bool = False) -> list[GradientEstimate]:
    evaluator = LeafScratch(model, optimizer.space) if leaf_scratch else Copy(optimizer.space)
    estimates = []
    for number in range(count):
        seed = derive_seed(5, optimizer.space.step_number())
        estimates.append(CentralDifference(EPSILON).estimate(evaluator(lambda: losses(model)), seed=seed))
        optimizer.step(estimate=estimates[number])
    return estimates


# -- thresholds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.01, 0.25, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_thresholds_are_exact_order_statistics(dtype: torch.dtype, fraction: float, monkeypatch: pytest.MonkeyPatch):
    """Of weights of all sizes, subnormal and infinite ones among them, counted a few at a time."""
    monkeypatch.setattr("mezo_lightning.magnitudes.chunk_numel", lambda device: 7)
    generator = torch.Generator().manual_seed(1)
    wide = (torch.randn(20, 30, generator=generator) * 10.0 ** torch.randint(-6, 5, (20, 30), generator=generator)).to(
        dtype
    )
    narrow = torch.randn(4, 5, generator=generator).to(dtype)
    named = [
        ("wide", nn.Parameter(wide)),
        ("norm", nn.Parameter(torch.ones(3, dtype=dtype))),
        ("b", nn.Parameter(narrow)),
    ]
    found = thresholds_of(MeZO(named, sampler=Sparse(fraction=fraction)))
    for name, weights in (("wide", wide), ("b", narrow)):
        magnitudes = weights.float().abs().flatten().sort().values
        assert found.pop(name) == magnitudes[math.ceil(fraction * weights.numel()) - 1]
    assert not found


def test_a_matrix_of_zeros_is_moved_as_a_whole(tmp_path: Path):
    """As LoRA's B is at the start; also where its weights have grown, and by a record that any parser can read."""
    b = torch.zeros(6, 5)
    b[0, 0] = -0.0
    named = [("a", nn.Parameter(torch.randn(5, 6, generator=torch.Generator().manual_seed(0)))), ("b", nn.Parameter(b))]
    optimizer = MeZO(named, 1.0, sampler=Sparse(fraction=0.5))
    assert thresholds_of(optimizer)["b"] == torch.finfo(torch.float32).max
    for seed in range(2):
        before = [parameter.detach().clone() for _, parameter in named]
        optimizer.step(estimate=GradientEstimate((seed,), (100.0,)))
        moved = [int((now != then).sum()) for (_, now), then in zip(named, before, strict=True)]
        assert moved[0] <= 15
        assert moved[1] == 30
    Trajectory.create(tmp_path / "log", Header.of(optimizer.space)).close()
    with Trajectory.open(tmp_path / "log") as log:
        text = json.dumps(log.header.sampler, allow_nan=False)
        again = sampler_from_dict(json.loads(text))
    assert isinstance(again, Sparse)
    assert again.thresholds == thresholds_of(optimizer)


# -- the published algorithm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Gaussian(), LowRank(2, refresh_right=2), Subset(blocks="embed|linear")], ids=str)
@pytest.mark.parametrize("leaf_scratch", [False, True])
def test_against_sparse_mezo_in_plain_torch(inner: Sampler, leaf_scratch: bool):
    """With masks as tensors, at steps so large that weights leave the mask on the way."""
    model, lr, fraction = make_model(), 0.05, 0.4
    mine = flat(model)
    largest = {n: w.abs().flatten().kthvalue(math.ceil(fraction * w.numel())).values for n, w in mine.items()}
    optimizer = MeZO(model.named_parameters(), lr, sampler=Sparse(inner, fraction))
    dense = inner.bind(optimizer.space.table)
    masks: list[dict[str, Tensor]] = []
    for number in range(6):
        masks.append({n: (w.abs() <= largest[n]) | (w.dim() < 2) for n, w in mine.items()})
        z = draw(dense, derive_seed(derive_seed(5, number), 0), number, mine)
        z = {n: masks[-1][n] * z[n] for n in mine}
        measured = []
        for side in (EPSILON, -EPSILON):
            with torch.no_grad():
                measured.append(float(losses_at(model, {n: mine[n] + side * z[n] for n in mine}).double().mean()))
        projected_grad = (measured[0] - measured[1]) / (2 * EPSILON)
        [estimate] = take_steps(model, optimizer, 1, leaf_scratch)
        assert estimate.projected_grads[0] == pytest.approx(projected_grad, rel=1e-3)
        mine = {n: mine[n] - lr * projected_grad * z[n] for n in mine}
        for name, weights in model.named_parameters():
            assert torch.allclose(weights, mine[name], rtol=1e-3, atol=1e-5)
        mine = flat(model)  # what is left of rounding must not put a weight on another side of a threshold
    assert any(not torch.equal(masks[0][n], masks[-1][n]) for n in mine)


def draw(directions: Any, seed: int, number: int, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A direction by the names of the parameters."""
    z, start = {}, 0
    whole = directions.fill(torch.empty(sum(w.numel() for w in like.values())), seed, 0, number)
    for name, weights in like.items():
        z[name] = whole[start : start + weights.numel()].view(weights.shape)
        start += weights.numel()
    return z


def losses_at(model: nn.Module, weights: dict[str, Tensor]) -> Tensor:
    return (torch.func.functional_call(model, weights, (torch.arange(9),)) - 1.0).square().mean(1)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated", "master"])
def test_in_16_bits_the_weights_that_are_probed_are_those_that_change(rounding: RoundingName):
    """The model's own decide, not what is kept beside them: that of the weight at a threshold moves past it first."""
    for seed in range(6):
        model = make_model(torch.bfloat16)
        space = MeZO(model.named_parameters(), sampler=Sparse(fraction=0.5), rounding=rounding).space
        space.apply([Step(((seed, (2.0**-12,)),), (0.0,))])
        before = space.save()
        [there] = [space.save() for _ in Copy(space).visit([Point(((99, 64.0),))])]
        probed = [now != then for now, then in zip(there, before, strict=True)]
        space.apply([Step(((99, (64.0,)),), (0.0,), 1)])
        changed = [now != then for now, then in zip(space.save(), before, strict=True)]
        assert all(torch.equal(one, other) for one, other in zip(probed, changed, strict=True))
        assert 0 < sum(int(some.sum()) for some in changed) < space.numel


@pytest.mark.parametrize("sampler", [Sparse(fraction=0.5), Subset(order="cyclic")], ids=str)
def test_dense_moments_move_what_a_step_leaves_out_as_in_torch(sampler: Sampler):
    """Where gradients are masked; a weight that no step has moved yet stays where it is."""
    values = torch.tensor([[0.5, -8.0], [-0.25, 1.0]])
    named = [(f"layers.{number}", nn.Parameter(values.clone())) for number in range(2)]
    optimizer = MeZO(named, 1.0, sampler=sampler, update=DenseMomentum(0.5))
    plain = [nn.Parameter(values.clone()) for _ in named]
    sgd = torch.optim.SGD(plain, 1.0, momentum=0.5)
    directions = optimizer.space.sampler.bind(optimizer.space.table)
    left_out_and_moved = 0
    for number in range(3):
        before = [weights.detach().clone() for weights in plain]
        for info, weights in zip(optimizer.space.table, plain, strict=True):
            z = directions.fill(torch.empty(info.numel), number, info.start, number).view(info.shape)
            active = directions.active(info, weights.detach())
            weights.grad = z if active is None else z * active
        sgd.step()
        optimizer.step(estimate=GradientEstimate((number,), (1.0,)))
        for (_, weights), other, old in zip(named, plain, before, strict=True):
            assert torch.allclose(weights, other)
            left_out_and_moved += int(((other.grad == 0) & (weights != old)).sum())
    assert left_out_and_moved
    if isinstance(sampler, Sparse):
        assert all(weights[0, 1] == -8.0 for _, weights in named)


# -- files and pieces --------------------------------------------------------------------------------------------------


def test_the_log_has_the_thresholds_and_replays_on_pieces(tmp_path: Path):
    """As mezo replay does, a part of a matrix at a time; and on a model."""
    model = make_model()
    optimizer = MeZO(model.named_parameters(), 0.05, sampler=Sparse(fraction=0.4))
    with Trajectory.create(tmp_path / "log", Header.of(optimizer.space)) as optimizer.trajectory:
        take_steps(model, optimizer, 5)
    with Trajectory.open(tmp_path / "log") as log:
        sampler = log.header.make_sampler()
        assert sampler == Sparse(fraction=0.4)
        assert isinstance(sampler, Sparse)
        assert sampler.thresholds == thresholds_of(optimizer)
        again = make_model()
        replay(again, log)
        base = make_model()
        for info in log.header.table:
            weights = base.get_parameter(info.name)
            for begin in range(0, info.numel, 4):
                piece = Slice(info, weights, begin, min(4, info.numel - begin))
                ParameterSpace([piece], log.header.table, log.header.make_sampler(), "stochastic").apply(list(log))
    for expected, one, other in zip(model.parameters(), again.parameters(), base.parameters(), strict=True):
        assert torch.equal(one, expected)
        assert torch.equal(other, expected)


def test_a_resumed_run_keeps_the_thresholds_of_the_base():
    """The optimizer of a resumed run is built on weights that have been tuned."""
    model = make_model()
    optimizer = MeZO(model.named_parameters(), 0.05, sampler=Sparse(fraction=0.4))
    take_steps(model, optimizer, 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    take_steps(model, optimizer, 2)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    other = make_model()
    other.load_state_dict(weights)
    resumed = MeZO(other.named_parameters(), 0.05, sampler=Sparse(fraction=0.4))
    assert thresholds_of(resumed) != thresholds_of(optimizer)
    resumed.load_state_dict(state)
    assert thresholds_of(resumed) == thresholds_of(optimizer)
    take_steps(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sparse(fraction=0.0), r"Sparse\(fraction=0.0\) must be above 0 and below 1"),
        (lambda: Sparse(fraction=1.0), r"Sparse\(fraction=1.0\) must be above 0 and below 1"),
        (lambda: Sparse(Sparse()), "leaves out weights twice"),
        (lambda: Sparse(thresholds={"w": 0.0}), r"Sparse\(thresholds=\{'w': 0.0\}\) must be a positive number"),
        (lambda: Subset(Sparse()), r"Subset\(sampler=Sparse\) does not know the weights, .* Sparse\(sampler=Subset\)"),
        (lambda: Scaled({"w": 2.0}, Sparse()), r"Scaled\(sampler=Sparse\) does not know the weights"),
        (
            lambda: Flipout(Sparse()),
            r"Flipout\(sampler=Sparse\) does not know .* 0: GRZO, .* cannot be combined with such",
        ),
    ],
)
def test_bad_settings(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("parameter", "arguments", "message"),
    [
        (
            torch.eye(4),
            {"sampler": Sparse()},
            r"12 of the 16 weights of 'w' are 0, .* raise fraction above 0.75, freeze",
        ),
        (torch.ones(4, 4), {"sampler": Sparse(), "update": Momentum()}, "a seed gives other ones by then"),
        (torch.ones(4, 4), {"sampler": Sparse(thresholds={"v": 1.0})}, r"has no threshold for 'w'"),
        (PIECE, {"sampler": Sparse()}, "Sparse: give thresholds: all weights of 'w' have to be counted"),
    ],
)
def test_what_cannot_be_tuned_says_so(parameter: Tensor, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeZO([("w", parameter if isinstance(parameter, Shard) else nn.Parameter(parameter))], **arguments)


def test_weight_decay_is_for_all_weights_and_a_large_one_does_nothing_else():
    weights = torch.tensor([[0.5, -8.0], [-0.0, 1.0]])
    space = ParameterSpace.of([("w", nn.Parameter(weights.clone()))], [0], Sparse(fraction=0.5), "stochastic")
    space.apply([Step(((3, (0.25,)),), (0.5,))])
    found = space.slices[0].weights.view(2, 2)
    z = Gaussian().fill(torch.empty(4), 3, 0).view(2, 2)
    assert torch.equal(found, weights * 0.5 + 0.25 * z * torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
