"""Which directions `mezo tune` measures along, and what it advises where lr is not in the units of plain MeZO."""

import io

import pytest
import torch
from closed_form import ClosedForm
from rich.console import Console
from torch import nn

from mezo_lightning.dense import DenseAdam
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
from mezo_lightning.evaluators import Copy
from mezo_lightning.flipout import Flipout
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, LaneSampler, Rademacher, Sampler
from mezo_lightning.scaled import Scaled, ScaledByNorm
from mezo_lightning.sparse import Sparse
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.transforms import Chain, Clip, Identity, Sign, Standardize, Transform
from mezo_lightning.tuning.measuring import Tuning, bend, measure
from mezo_lightning.tuning.report import advise, table
from mezo_lightning.tuning.units import Units, independent, units_of
from mezo_lightning.updates import Momentum, ScalarAdam, Trail, Update

PLAIN, NONE = CentralDifference(), Identity()


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    """Of a bowl, beside its lowest point."""
    theta = torch.full((60,), 0.1, dtype=torch.float64)
    return measure([ClosedForm(Gaussian(), theta, lambda x: x @ x / 2)] * 2, seed=1, num_directions=16)


def units(
    estimator: Estimator = PLAIN,
    transform: Transform = NONE,
    update: Update | None = None,
    sampler: Sampler | None = None,
) -> Units:
    """Those of a run with these parts."""
    matrix = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    return units_of(MeZO([("layers.0.weight", matrix)], update=update, sampler=sampler), estimator, transform)


@pytest.mark.parametrize(
    "sampler",
    [
        LowRank(rank=1),
        LowRank(rank=2, core="dense", refresh_left=1000, refresh_right=1000),
        LowRank(rank=2, core="diagonal", refresh_left=None, refresh_right=None),
        Flipout(),
        Subset(blocks=r"\d", order="cyclic"),
        Scaled(scales={"0": 4}),
        Sparse(),
        Rademacher(),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_the_rank_is_that_of_the_hessian_whatever_the_sampler_of_the_run_is(sampler: Sampler):
    """The Hessian is diagonal, 1 for 20 weights of each matrix and 0 for the others: its effective rank is 40."""
    weights = nn.ParameterList([torch.full((20, 10), 0.1, dtype=torch.float32) for _ in range(2)])
    with torch.no_grad():
        for weight in weights:
            weight[10:] = -0.2  # for Sparse: weights of different magnitudes
    space = MeZO(weights.named_parameters(), sampler=sampler).space
    space.sampler = independent(space.sampler)
    curved = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:20]
    evaluate = Copy(space)(lambda: sum(w.view(-1)[curved].double().square().sum() for w in weights).view(1) / 2)
    found = bend(evaluate, 0.0, 1e-1, seed=3)
    assert found.effective_rank == pytest.approx(40, rel=0.4)
    assert found.trace == pytest.approx(40, rel=0.2)
    assert isinstance(space.sampler, type(sampler) if isinstance(sampler, LaneSampler) else Gaussian)


@pytest.mark.parametrize(
    "parts",
    [
        {"estimator": ForwardDifference()},
        {"estimator": GuidingVector(pool_size=8)},
        {"estimator": GuidingVector(match_norm=False)},  # with a pool of 4, norms match anyway
        {"estimator": GreedyDirection()},
        {"estimator": Cone(), "update": Trail()},
        {"estimator": GRZO(normalize=False), "sampler": Flipout()},
        {},
    ],
)
def test_rules_with_steps_like_those_of_mezo_are_advised_a_learning_rate(tuning: Tuning, parts: dict):
    found = units(**parts)
    assert found.other_units == ()
    assert advise(tuning, found) == advise(tuning)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ({"estimator": FZOO()}, ["estimator: FZOO"]),
        ({"estimator": Population()}, ["estimator: Population"]),
        ({"estimator": Comparison()}, ["estimator: Comparison"]),
        ({"estimator": Ranking()}, ["estimator: Ranking"]),
        ({"estimator": GRZO(), "sampler": Flipout()}, ["estimator: GRZO"]),
        ({"estimator": GuidingVector(pool_size=8, match_norm=False)}, ["estimator: GuidingVector"]),
        ({"transform": Standardize()}, ["transform: Standardize"]),
        ({"transform": Sign()}, ["transform: Sign"]),
        ({"transform": Chain([Clip(1.0)])}, ["transform: Chain"]),
        ({"update": ScalarAdam()}, ["update: ScalarAdam"]),
        ({"update": DenseAdam()}, ["update: DenseAdam"]),
        ({"transform": Clip(1.0), "update": Momentum()}, ["transform: Clip", "update: Momentum"]),
    ],
)
def test_rules_with_other_units_are_advised_a_size_of_step(tuning: Tuning, parts: dict, names: list[str]):
    lr, step = advise(tuning)[1], advise(tuning, units(**parts))[1]
    assert (lr.option, step.option) == ("lr", "RMS step, not lr")
    assert float(step.value) == pytest.approx(float(lr.value) * tuning.best.slope, rel=2e-2)
    parts = " and ".join(f"`{name}`" for name in names)
    assert f"With {parts} the same lr makes other steps" in step.reason


@pytest.mark.parametrize(
    ("sampler", "along", "alike"),
    [
        (Gaussian(), "Gaussian()", True),
        (Rademacher(), "Rademacher()", True),
        (LowRank(rank=1), "Gaussian()", True),
        (Flipout(), "Gaussian()", True),
        (Subset(), "Gaussian()", False),
        (Sparse(), "Gaussian()", False),
        (Scaled({"[a-z]+": 2}), "Gaussian()", False),
        (ScaledByNorm(), "Gaussian()", False),
        (Flipout(Scaled({"layers": 2})), "Gaussian()", False),
    ],
    ids=str,
)
def test_the_table_says_what_everything_was_measured_along(tuning: Tuning, sampler: Sampler, along: str, alike: bool):
    found = units(sampler=sampler)
    assert (found.measured_along, found.sampler, found.moves_all_alike) == (along, repr(sampler), alike)
    text = io.StringIO()
    Console(file=text, width=500).print(table(tuning, found))
    assert ("the run's sampler is" in text.getvalue()) == (along != repr(sampler))
    assert along == repr(sampler) or f"the run's sampler is {sampler}" in text.getvalue()
    assert ("epsilon and lr are those of directions over all" in text.getvalue()) == (not alike)
