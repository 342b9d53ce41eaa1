"""Directions with a scale for each parameter, named or by norm: against unscaled ones, in files and in refusals."""

import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.magnitudes import sum_of_squares
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterInfo, Slice
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler
from mezo_lightning.scaled import Scaled, ScaledByNorm
from mezo_lightning.shards import Shard
from mezo_lightning.sparse import Sparse
from mezo_lightning.steps import GradientEstimate
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.trajectory import Header, Trajectory, replay
from mezo_lightning.updates import Momentum

TABLE = [
    ParameterInfo("embed.weight", (5, 4), 0, 0),
    ParameterInfo("layers.0.weight", (4, 4), 20, 0),
    ParameterInfo("layers.1.weight", (4, 4), 36, 0),
    ParameterInfo("norm.bias", (3,), 52, 0),
]
SCALES = {r"layers\.1": 8.0, "layers": 0.5, "bias": 2.0**-10}
EXPECTED = torch.cat([torch.full((20,), 1.0), torch.full((16,), 0.5), torch.full((16,), 8.0), torch.full((3,), 2**-10)])


def whole(sampler: Sampler, table: Sequence[ParameterInfo] = TABLE) -> Tensor:
    return sampler.bind(table).fill(torch.empty(55), 7, 0, 3)


@pytest.mark.parametrize(
    "inner", [Gaussian(), Rademacher(), LowRank(), Subset(fraction=0.5), Flipout()], ids=lambda s: type(s).__name__
)
def test_each_parameter_has_the_scale_of_the_first_pattern_in_its_name(inner: Sampler):
    assert torch.equal(whole(Scaled(SCALES, inner)), whole(inner) * EXPECTED)


def test_directions_that_share_a_scaled_draw_are_scaled():
    assert torch.equal(whole(Flipout(Scaled(SCALES))), whole(Flipout()) * EXPECTED)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


@pytest.mark.parametrize("leaf_scratch", [False, True])
def test_perturbation_and_update_are_both_scaled(leaf_scratch: bool):
    """In plain torch, with the noise as a tensor: theta - lr g s z, with g measured along s z."""
    model, scales = make_model(), {r"1\.": 4.0}
    optimizer = MeZO(model.named_parameters(), lr=2.0**-8, sampler=Scaled(scales))
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    s = torch.cat([torch.full((p.numel(),), 4.0 if name[0] == "1" else 1.0) for name, p in model.named_parameters()])
    x = torch.randn(6, 4)

    def loss() -> Tensor:
        return model(x).square().mean(1)

    evaluator = LeafScratch(model, optimizer.space) if leaf_scratch else Copy(optimizer.space)
    estimate = CentralDifference(2.0**-6).estimate(evaluator(loss), seed=1)
    optimizer.step(estimate=estimate)
    [seed], [g] = estimate.seeds, estimate.projected_grads
    moved = nn.utils.parameters_to_vector(model.parameters()).detach() - start
    z = s * Gaussian().fill(torch.empty_like(start), seed, 0)
    values = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * 2.0**-6 * z, model.parameters())
        values.append(float(loss().detach().double().mean()))
    assert g == pytest.approx((values[0] - values[1]) * 2**5, rel=1e-3)
    assert torch.allclose(moved, -(2.0**-8) * g * z, rtol=1e-3, atol=1e-7)


def test_a_log_has_the_table_in_order_and_replays_to_the_last_bit(tmp_path: Path):
    model = make_model()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, sampler=Scaled({r"1\.weight": 2.0, "weight": 0.25}))
    with closing(Trajectory.create(tmp_path / "t", Header.of(optimizer.space))) as optimizer.trajectory:
        optimizer.step(estimate=GradientEstimate((1, 2), (0.5, -1.5)))
    with closing(Trajectory.open(tmp_path / "t")) as log:
        record = json.dumps(log.header.sampler, sort_keys=True)
        assert '"scales": [["1\\\\.weight", 2.0], ["weight", 0.25]]' in record
        sampler = log.header.make_sampler()
        assert isinstance(sampler, Scaled)
        assert list(sampler.scales) == [r"1\.weight", "weight"]
        replay(other := make_model(), log)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(make_model().get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_momentum_goes_with_it_where_it_goes_with_what_is_scaled():
    parameters = list(make_model().named_parameters())
    MeZO(parameters, sampler=Scaled({"weight": 2.0}), update=Momentum())
    with pytest.raises(ValueError, match=r"applies the directions of earlier steps again, but with sampler=Scaled"):
        MeZO(parameters, sampler=Scaled({"weight": 2.0}, LowRank()), update=Momentum())


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, r"Scaled\(scales=\{\}\) scales nothing"),
        ({"(": 2.0}, r"'\(' is no regular expression"),
        ({"a": 3.0}, r"'a': 3.0\}\) must be a power of two, so that directions keep their bits: take 2 or 4"),
        ({"a": 0.3}, "take 0.25 or 0.5"),
        ({"a": 0.0}, "must be a power of two from 1/1024 to 1024"),
        ({"a": -2.0}, "from 1/1024 to 1024"),
        ({"a": 2.0**11}, "from 1/1024 to 1024"),
        ({"a": float("nan")}, "from 1/1024 to 1024"),
    ],
)
def test_wrong_scales_are_refused_by_name(scales: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        Scaled(scales)


def test_a_pattern_that_fits_nothing_is_refused_before_anything_is_filled():
    with pytest.raises(ValueError, match=r"'layer\\\\\.' is found in the name of no trainable parameter"):
        whole(Scaled({"embed": 2.0, r"layer\.": 2.0}))


# -- scales by norm ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers with weights of different sizes, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 5)
        self.layers = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
        with torch.no_grad():
            self.layers[1].weight.mul_(7.0)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net()


def scales_of(optimizer: MeZO) -> dict[str, float]:
    sampler = optimizer.space.sampler
    assert isinstance(sampler, ScaledByNorm)
    assert sampler.scales is not None
    return sampler.scales


BLOCKS = ("embed", "layers.0", "layers.1", "head")


def exact_scales(net: Net) -> dict[str, float]:
    """Before they are rounded: a / c, such that a direction is as long as without them."""
    blocks = {
        b: torch.cat([p.detach().flatten() for n, p in net.named_parameters() if n.startswith(b)]) for b in BLOCKS
    }
    common = sum(w.numel() for w in blocks.values()) / sum(float(w.numel() / w.square().sum()) for w in blocks.values())
    return {block: math.sqrt(common) / float(w.norm()) for block, w in blocks.items()}


def test_scales_are_the_powers_of_two_that_are_nearest_to_inverse_norms():
    net = make_net()
    found, exact = scales_of(MeZO(net.named_parameters(), sampler=ScaledByNorm())), exact_scales(net)
    assert found == {block: 2.0 ** round(math.log2(scale)) for block, scale in exact.items()}
    assert len(set(found.values())) == 3
    squares = sum(p.numel() * exact[n.rpartition(".")[0]] ** 2 for n, p in net.named_parameters())
    assert squares == pytest.approx(sum(p.numel() for p in net.parameters()))


def test_norms_do_not_depend_on_the_order_of_weights(monkeypatch: pytest.MonkeyPatch):
    """Nor on chunks; of weights whose squares differ by far."""
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(40, 30, generator=generator) * 10.0 ** torch.randint(-9, 9, (40, 30), generator=generator)
    orders = [nn.Parameter(weights) for weights in (wide, wide.flip(0, 1), wide.T.contiguous().view(40, 30))]
    found = []
    for chunk in (10_000, 7):
        monkeypatch.setattr("mezo_lightning.magnitudes.chunk_numel", lambda device, chunk=chunk: chunk)
        found += [sum_of_squares(Slice.of(ParameterInfo("w", (40, 30), 0, 0), w), advice="") for w in orders]
    assert len(set(found)) == 1
    assert found[0] == pytest.approx(float(wide.double().square().sum()), rel=2**-6)


@pytest.mark.parametrize("leaf_scratch", [False, True])
def test_against_the_rule_in_plain_torch(leaf_scratch: bool):
    """Perturb each block by z / c, and update along the same direction, with c and z as tensors."""
    net, lr, epsilon = make_net(), 2.0**-8, 2.0**-6
    scales = {block: 2.0 ** round(math.log2(scale)) for block, scale in exact_scales(net).items()}
    optimizer = MeZO(net.named_parameters(), lr, sampler=ScaledByNorm())
    evaluator = LeafScratch(net, optimizer.space) if leaf_scratch else Copy(optimizer.space)
    s = torch.cat([torch.full((p.numel(),), scales[n.rpartition(".")[0]]) for n, p in net.named_parameters()])
    theta = nn.utils.parameters_to_vector(net.parameters()).detach().clone()
    reference = make_net()

    def loss(of: nn.Module) -> Tensor:
        return (of(torch.arange(9)) - 1.0).square().mean(1)

    for step in range(4):
        estimate = CentralDifference(epsilon).estimate(evaluator(lambda: loss(net)), seed=step)
        optimizer.step(estimate=estimate)
        z, values = s * Gaussian().fill(torch.empty_like(theta), estimate.seeds[0], 0), []
        for side in (epsilon, -epsilon):
            nn.utils.vector_to_parameters(theta + side * z, reference.parameters())
            values.append(float(loss(reference).detach().double().mean()))
        projected_grad = (values[0] - values[1]) / (2 * epsilon)
        assert estimate.projected_grads[0] == pytest.approx(projected_grad, rel=1e-3)
        theta = theta - lr * projected_grad * z
        assert torch.allclose(nn.utils.parameters_to_vector(net.parameters()), theta, rtol=1e-3, atol=1e-5)


def test_log_and_checkpoint_have_the_scales_of_the_base(tmp_path: Path):
    net = make_net()
    optimizer = MeZO(net.named_parameters(), 1.0, sampler=ScaledByNorm())
    found = scales_of(optimizer)
    with Trajectory.create(tmp_path / "log", Header.of(optimizer.space)) as optimizer.trajectory:
        optimizer.step(estimate=GradientEstimate((1, 2), (0.5, -1.5)))
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        resumed = MeZO(net.named_parameters(), 1.0, sampler=ScaledByNorm())
        assert scales_of(resumed) != found
        resumed.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        assert scales_of(resumed) == found
    with Trajectory.open(tmp_path / "log") as log:
        replay(again := make_net(), log)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_a_sampler_of_which_another_is_made_finds_its_scales_too():
    named = list(make_net().named_parameters())
    found = scales_of(MeZO(named, sampler=ScaledByNorm()))
    for outer in (Subset(ScaledByNorm()), Flipout(ScaledByNorm()), Scaled({"head": 2.0}, ScaledByNorm())):
        inner = MeZO(named, sampler=outer).space.sampler.sampler  # pyright: ignore[reportAttributeAccessIssue]
        assert inner.scales == found
    settled = MeZO(named, sampler=Sparse(ScaledByNorm())).space.sampler
    assert isinstance(settled, Sparse)
    assert isinstance(settled.sampler, ScaledByNorm)
    assert settled.sampler.scales == found
    assert sampler_as_dict(sampler_from_dict(sampler_as_dict(settled))) == sampler_as_dict(settled)


def test_blocks_of_zeros_and_of_far_larger_weights_than_others():
    blocks = {"layers.0": torch.zeros(3, 3), "layers.1": torch.ones(3, 3), "w": torch.full((3, 3), 2.0**20)}
    named = [(name, nn.Parameter(weights)) for name, weights in blocks.items()]
    assert scales_of(MeZO(named, sampler=ScaledByNorm())) == {"layers.0": 1.0, "layers.1": 1.0, "w": 2.0**-10}
    assert scales_of(MeZO(named[:1], sampler=ScaledByNorm())) == {"layers.0": 1.0}


@pytest.mark.parametrize(
    ("sampler", "weights", "message"),
    [
        (lambda: ScaledByNorm(blocks="("), torch.ones(2), r"ScaledByNorm\(blocks\): '\(' is no regular expression"),
        (
            lambda: ScaledByNorm(scales={"w": 3.0}),
            torch.ones(2),
            r"ScaledByNorm\(scales=\{'w': 3.0\}\) must be a power",
        ),
        (lambda: ScaledByNorm(Sparse()), torch.ones(2), r"it the other way round, Sparse\(sampler=ScaledByNorm\)"),
        (lambda: ScaledByNorm(scales={"v": 2.0}), torch.ones(2), r"no scale for 'w', the block of 'w': give one"),
        (lambda: ScaledByNorm(), torch.tensor([1.0, math.inf]), "some weights of 'w' are not finite"),
        (lambda: ScaledByNorm(), Shard(torch.ones(8), (4, 4), 0), "ScaledByNorm: give scales: all weights of 'w' have"),
    ],
)
def test_what_has_no_scales_says_so(sampler: Callable[[], Sampler], weights: Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        MeZO([("w", weights if isinstance(weights, Shard) else nn.Parameter(weights))], sampler=sampler())
