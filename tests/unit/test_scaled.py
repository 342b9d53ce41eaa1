"""Directions with a scale for each parameter: against the unscaled ones, in files and in refusals."""

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterInfo
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler
from mezo_lightning.scaled import Scaled
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
