"""Directions that share one draw a step and differ in signs: the formula, the same bits for every cut, and replay."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from closed_form import table_of
from torch import Tensor, nn

from mezo_lightning import GRZO, Flipout, Gaussian, LowRank, MeZO, Rademacher, Rowwise, Subset
from mezo_lightning.evaluators import Copy
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Sampler, derive_seed
from mezo_lightning.trajectory import Header, Trajectory, replay

SHAPES = {"embed": (11, 6), "w": (64, 48), "b": (64,), "layers.0.conv": (3, 4, 5), "scale": (), "norm": (13,)}
SAMPLERS = {
    "gaussian": Flipout(),
    "rademacher": Flipout(Rademacher(), seed=5),
    "low rank": Flipout(LowRank(2, refresh_left=0, refresh_right=3)),
    "subset": Flipout(Subset(blocks=r"layers\.\d+|embed", fraction=0.5)),
}


TABLE = table_of(SHAPES)
NUMEL = TABLE[-1].start + TABLE[-1].numel


def z(sampler: Sampler, seed: int = 1, number: int = 0) -> Tensor:
    return sampler.bind(TABLE).fill(torch.empty(NUMEL), seed, 0, number)


@pytest.mark.parametrize("name", SAMPLERS)
def test_any_cut_gives_the_same_bits(name: str):
    whole, directions = z(SAMPLERS[name], 5, 4), SAMPLERS[name].bind(TABLE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        cuts = sorted({0, NUMEL, *torch.randint(1, NUMEL, (9,), generator=generator).tolist()})
        parts = [directions.fill(torch.empty(b - a), 5, a, 4) for a, b in reversed(list(pairwise(cuts)))]
        assert torch.equal(torch.cat(parts[::-1]), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_rows_are_those_of_the_whole(name: str):
    for info in TABLE[:2]:
        rows, width = torch.tensor([3, 0, 6, 3]), info.shape[1]
        found = SAMPLERS[name].bind(TABLE).rows(9, rows * width + info.start, width, 2)
        whole = z(SAMPLERS[name], 9, 2)[info.start : info.start + info.numel].view(info.shape)
        assert torch.equal(found, whole[rows])


@pytest.mark.parametrize("name", SAMPLERS)
def test_it_is_a_shared_draw_times_signs(name: str):
    """Against U and the signs written out; signs have rank one in a matrix, and U is the inner sampler's."""
    config, number = SAMPLERS[name], 7
    inner = config.sampler.bind(TABLE).fill(torch.empty(NUMEL), derive_seed(config.seed or 0, 0, number), 0, number)
    first = 0
    for info in TABLE:
        rows = info.numel if len(info.shape) < 2 else info.shape[0]
        columns = 0 if len(info.shape) < 2 else info.numel // rows
        for seed in (3, 4):
            signs = Rademacher().fill(torch.empty(rows + columns), seed, first)
            left, right = signs[:rows, None], signs[None, rows:] if columns else torch.ones(1, 1)
            expected = inner[info.start : info.start + info.numel].view(rows, -1) * left * right
            assert torch.equal(z(config, seed, number)[info.start : info.start + info.numel].view(rows, -1), expected)
        first += rows + columns


def test_what_a_step_shares_and_what_it_does_not():
    one, other = z(Flipout(), 1), z(Flipout(), 2)
    assert torch.equal(one.abs(), other.abs())
    assert not torch.equal(one, other)
    assert not torch.equal(z(Flipout(), 1, 0).abs(), z(Flipout(), 1, 1).abs())
    assert not torch.equal(z(Flipout(), 1).abs(), z(Flipout(seed=1), 1).abs())
    assert not Flipout().same_at_every_step


def test_directions_of_a_step_are_uncorrelated_and_of_unit_variance():
    table = table_of({"w": (100, 50), "b": (100,)})
    directions = Flipout().bind(table)
    many = torch.stack([directions.fill(torch.empty(5100), seed, 0) for seed in range(64)]).double()
    gram = many @ many.T / 5100
    assert float(gram.diagonal().mean()) == pytest.approx(1.0, abs=0.05)
    off = gram - gram.diagonal().diag()
    assert float(off.square().mean().sqrt()) < 0.05
    assert abs(float(off.mean())) < 0.005


@pytest.mark.parametrize("name", SAMPLERS)
def test_settings_survive_their_record(name: str):
    assert sampler_from_dict(sampler_as_dict(SAMPLERS[name])) == SAMPLERS[name]


def test_what_is_kept_of_a_chunk_is_for_that_chunk_and_step_alone():
    directions = Flipout().bind(TABLE)
    asked = [(1, 0, 0), (2, 0, 0), (2, 5, 0), (2, 5, 1), (1, 5, 1), (1, 0, 0)]
    for seed, start, number in asked:
        found = directions.fill(torch.empty(60), seed, start, number)
        assert torch.equal(found, z(Flipout(), seed, number)[start : start + 60])


def test_steps_are_replayed_from_the_log(tmp_path: Path):
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 5))

    tuned, ids = model(), torch.arange(8).view(4, 2)
    optimizer = MeZO(tuned.named_parameters(), lr=0.01, weight_decay=0.1, sampler=Flipout(Gaussian(), 3))
    evaluator = Rowwise(tuned, optimizer.space, Copy(optimizer.space))
    with Trajectory.create(tmp_path / "t", Header.of(optimizer.space)) as optimizer.trajectory:
        evaluate = evaluator(lambda: tuned(ids).square().mean((1, 2)))
        for step in range(5):
            optimizer.step(estimate=GRZO(0.1).estimate(evaluate, seed=step))
    again = model()
    with Trajectory.open(tmp_path / "t") as trajectory:
        assert trajectory.header.make_sampler() == Flipout(Gaussian(), 3)
        assert [len(step.terms) for step in trajectory] == [4] * 5
        replay(again, trajectory)
    for one, other, first in zip(tuned.parameters(), again.parameters(), model().parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, first)
