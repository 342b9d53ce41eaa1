"""What `mezo tune` measures, on objectives whose curvature, noise and batches are known."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from closed_form import ClosedForm
from rich.console import Console
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy, Evaluation, Samples
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, LaneSampler, Rademacher, derive_seed
from mezo_lightning.steps import Point
from mezo_lightning.tuning.measuring import BatchNoise, Tuning, bend, best_rung, climb, compare, measure, noise_floors
from mezo_lightning.tuning.report import advise, picture, table

SPECTRA = {
    "1 / i": 1 / torch.arange(1, 501, dtype=torch.float64),  # effective rank 28
    "exponential": torch.exp(-torch.arange(300, dtype=torch.float64) / 20),  # 40
    "flat": torch.ones(60, dtype=torch.float64),  # 60
}
RANKS = {  # of 100 weights
    "flat": torch.ones(100, dtype=torch.float64),
    "1 / i": 1 / torch.arange(1, 101, dtype=torch.float64),  # effective rank 16
    "1 / i^2": 1 / torch.arange(1, 101, dtype=torch.float64) ** 2,  # 2.5
    "half in one": torch.tensor([99.0] + [1.0] * 99, dtype=torch.float64),  # 4
    "four fifths in one": torch.tensor([396.0] + [1.0] * 99, dtype=torch.float64),  # 1.6
}


def bowl(spectrum: Tensor, sampler: LaneSampler | None = None, slope: float = 0.1) -> ClosedForm:
    """A quadratic with this spectrum, not at its lowest point."""
    theta = torch.full_like(spectrum, slope)
    return ClosedForm(sampler or Gaussian(), theta, lambda x: (spectrum * x * x).sum() / 2)


def shaken(objective: ClosedForm, size: float) -> Callable[[Sequence[Point]], Evaluation]:
    """The objective with an error of its own, of this standard deviation, the same whenever a point is asked for."""

    def evaluate(points: Sequence[Point]) -> Evaluation:
        values = []
        for point, value in zip(points, objective(points).means, strict=True):
            generator = torch.Generator().manual_seed(hash(point.terms) % 2**62)
            values.append(Samples.of(value + size * torch.randn(1, generator=generator, dtype=torch.float64)))
        return Evaluation.of(points, values, 0.5)

    return evaluate


# -- curvature --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", [Gaussian(), Rademacher()])
@pytest.mark.parametrize("name", SPECTRA)
def test_trace_and_effective_rank_of_a_known_spectrum(name: str, sampler: LaneSampler):
    spectrum = SPECTRA[name]
    rank = float(spectrum.sum() ** 2 / spectrum.square().sum())
    found = bend(bowl(spectrum, sampler), 0.0, 1e-2, seed=3, num_directions=64)
    assert found.effective_rank == pytest.approx(rank, rel=0.4)
    low, high = found.rank_interval
    assert low < found.effective_rank < high
    assert 0.6 * rank < high
    assert low < 1.4 * rank
    assert abs(found.trace - float(spectrum.sum())) <= 4 * found.trace_error + 1e-6
    assert len(found.along) == 64


def test_intervals_of_the_rank_hold_what_they_say():
    spectrum = SPECTRA["exponential"]
    rank = float(spectrum.sum() ** 2 / spectrum.square().sum())
    objective = bowl(spectrum)
    intervals = [bend(objective, 0.0, 1e-2, seed=seed, num_directions=32).rank_interval for seed in range(12)]
    assert sum(low <= rank <= high for low, high in intervals) >= 9


def test_noise_is_taken_off_the_curvature_and_where_it_drowns_it_nothing_is_claimed():
    spectrum, noise = SPECTRA["exponential"], 5e-5
    clear = bend(shaken(bowl(spectrum), noise), noise, 1e-2, seed=1)
    assert clear.effective_rank == pytest.approx(40, rel=0.4)
    drowned = bend(shaken(bowl(spectrum), noise), noise, 1e-3, seed=1)
    assert math.isnan(drowned.effective_rank)
    assert math.isnan(drowned.largest_stable_lr)


def test_a_saddle_has_no_effective_rank():
    spectrum = torch.cat([torch.ones(60, dtype=torch.float64), -0.9 * torch.ones(60, dtype=torch.float64)])
    found = bend(bowl(spectrum), 0.0, 1e-2, seed=1)
    assert math.isnan(found.effective_rank)
    assert found.trace == pytest.approx(6, abs=4 * found.trace_error)


def stable_lr(spectrum: Tensor, queries: int = 1) -> float:
    """Up to which learning rate the mean square of every weight shrinks, exactly, for the mean of Gaussian directions.

    E[S a a' S] of S, the mean of q matrices z z', is ((q + 1) a a' + |a|^2) / q: of a = H theta, its diagonal says what
    the mean squares of the weights become.
    """

    def growth(lr: float) -> float:
        own = 1 - 2 * lr * spectrum + (1 + 1 / queries) * (lr * spectrum) ** 2
        step = torch.diag(own) + (lr * spectrum) ** 2 / queries * torch.ones_like(spectrum)[:, None]
        return float(torch.linalg.eigvals(step).abs().max())

    low, high = 0.0, 4 * queries / float(spectrum.sum())
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if growth(middle) < 1 else (low, middle)
    return low


@pytest.mark.parametrize("name", RANKS)
def test_the_largest_stable_lr_is_stable_also_where_the_rank_is_small(name: str):
    spectrum = RANKS[name]
    true = stable_lr(spectrum)
    for seed in range(4):
        found = bend(bowl(spectrum), 0.0, 1e-2, seed=seed)
        assert float(spectrum.max()) <= 1.05 * found.largest_eigenvalue
        assert 0.4 * true < found.largest_stable_lr < true


@pytest.mark.parametrize("queries", [4, 32])
@pytest.mark.parametrize("name", RANKS)
def test_what_more_directions_allow_is_stable(name: str, queries: int):
    spectrum = RANKS[name]
    found = bend(bowl(spectrum), 0.0, 1e-2, seed=1)
    most = found.most_by_queries
    assert queries * most / (most - 1 + queries) * found.largest_stable_lr < stable_lr(spectrum, queries)
    if name == "four fifths in one":
        assert queries * found.largest_stable_lr > stable_lr(spectrum, queries)  # not q times as much


@pytest.mark.parametrize("name", RANKS)
def test_the_learning_rate_that_is_recommended_descends(name: str):
    """Of the optimizer itself, on every seed."""
    spectrum = RANKS[name]
    tuning = measure([bowl(spectrum, slope=1.0)] * 2, seed=1)
    advice = advise(tuning)[1]
    assert "L = tr(H) / sqrt(effective rank) bounds the eigenvalues; tr(H) and L are taken two" in advice.reason
    for seed in range(3):
        theta = nn.Parameter(torch.ones(100))
        optimizer = MeZO([("x", theta)], lr=float(advice.value))
        losses: list[float] = []

        def loss(theta: Tensor = theta) -> Tensor:
            return (spectrum * theta.double() ** 2).sum().view(1) / 2

        evaluate = Copy(optimizer.space)(loss)
        for step in range(60):
            optimizer.step(estimate=CentralDifference(1e-3).estimate(evaluate, seed=derive_seed(seed, step)))
            losses.append(float(loss().detach()))
        assert losses[-1] < 0.8 * float(spectrum.sum() / 2)
        assert max(losses) < 1.5 * float(spectrum.sum() / 2)


def test_where_noise_hides_the_rank_the_learning_rate_is_on_the_safe_side(tuning: Tuning):
    spectrum, noise = torch.ones(400, dtype=torch.float64), 2.5e-3
    hidden = replace(tuning, curvature=bend(shaken(bowl(spectrum), noise), noise, 1e-2, seed=1))
    assert math.isnan(hidden.curvature.effective_rank)
    assert 0.3 * stable_lr(spectrum) < hidden.curvature.largest_stable_lr < stable_lr(spectrum)
    assert "with its noise, for want of the effective rank" in advise(hidden)[1].reason


# -- noise and epsilon ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-8, 1e-4])
def test_the_noise_floor_is_found(size: float):
    objective = bowl(SPECTRA["1 / i"], slope=1.0)
    floors = noise_floors(shaken(objective, size), seed=1)
    assert len(floors) == 9
    assert all(size / 2 < floor < 2 * size for floor in floors)
    assert max(noise_floors(objective, seed=1)) < 1e-12


@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_noise_floor_of_16_bit_weights_is_their_rounding_error_that_far_away(dtype: torch.dtype, size: float):
    """Of a linear objective, the exact value is known at any point."""
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter((size * torch.randn(80, 80, generator=generator)).to(dtype))
    slopes = torch.randn(80, 80, generator=generator, dtype=torch.float64) / 80
    optimizer = MeZO([("w", weights)])
    evaluate = Copy(optimizer.space)(lambda: (weights.double() * slopes).sum().view(1))
    directions = optimizer.space.sampler.bind(optimizer.space.table)
    here = weights.detach().double()
    epsilons = (1e-3, 3e-3, 1e-2, 3e-2)
    floors, shares = noise_floors(evaluate, seed=1, epsilons=epsilons), []
    for epsilon, floor in zip(epsilons, floors, strict=True):
        points = [Point(((seed, epsilon),)) for seed in range(12)]
        errors = []
        for point, value in zip(points, evaluate(points).means, strict=True):
            ((seed, coefficient),) = point.terms
            z = directions.fill(torch.empty(6400), seed, 0, 0).view(80, 80).double()
            errors.append(value - float(((here + coefficient * z) * slopes).sum()))
        shares.append(floor / math.sqrt(np.square(errors).mean()))
    assert all(1 / 3 < share < 3 for share in shares)
    assert 0.5 < math.exp(np.log(shares).mean()) < 2


def test_slopes_are_wrong_by_noise_below_and_by_higher_derivatives_above():
    theta = torch.linspace(0.1, 1, 50, dtype=torch.float64)
    wave = ClosedForm(Gaussian(), theta, lambda x: torch.sin(20 * x).sum())
    ladder = climb(shaken(wave, 1e-3), [1e-3] * 9, seed=1)
    best = best_rung(ladder)
    assert [rung.noise > rung.change for rung in ladder] == sorted((r.noise > r.change for r in ladder), reverse=True)
    assert 1e-4 < best.epsilon < 2e-2
    assert best.usable
    assert not ladder[0].usable
    assert not ladder[-1].usable
    assert best.slope == pytest.approx(float((20 * torch.cos(20 * theta)).norm()), rel=0.5)


def test_16_bit_weights_need_a_larger_epsilon():
    torch.manual_seed(0)
    model, x, y = (
        nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 4)),
        torch.randn(64, 16),
        torch.arange(64) % 4,
    )
    smallest = {}
    for dtype in (torch.float32, torch.bfloat16):
        evaluator = Copy(MeZO(model.to(dtype).named_parameters()).space)
        evaluate = evaluator(lambda dtype=dtype: F.cross_entropy(model(x.to(dtype)).float(), y, reduction="none"))
        ladder = climb(evaluate, noise_floors(evaluate, seed=1), seed=1, num_directions=4)
        smallest[dtype] = min(rung.epsilon for rung in ladder if rung.usable)
    assert smallest[torch.bfloat16] >= 10 * smallest[torch.float32]


def test_a_step_like_reward_shows_its_ties():
    steps = ClosedForm(Gaussian(), torch.zeros(4, dtype=torch.float64), lambda x: torch.round(20 * x).sum())
    ladder = climb(steps, [0.0] * 9, seed=1)
    assert ladder[0].tie_fraction == 1.0
    assert ladder[-1].tie_fraction < 0.5
    assert best_rung(ladder).tie_fraction < 0.5


# -- batches ----------------------------------------------------------------------------------------------------------


def batches_of(signal: float, noise: float, count: int = 4) -> list[ClosedForm]:
    """Linear objectives whose gradients share a part and have a part of their own, of these squared lengths."""
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(count + 1, 200, generator=generator, dtype=torch.float64)
    parts /= parts.norm(dim=1, keepdim=True)
    gradients = math.sqrt(signal) * parts[0] + math.sqrt(noise) * parts[1:]
    theta = torch.zeros(200, dtype=torch.float64)
    return [ClosedForm(Gaussian(), theta, lambda x, g=g: g @ x + 0.05 * x @ x) for g in gradients]


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 0.25), (1.0, 4.0), (9.0, 9.0)])
def test_signal_and_noise_of_batches_are_told_apart(signal: float, noise: float):
    found = compare(batches_of(signal, noise), 1e-3, seed=2, num_directions=64)
    assert found.signal == pytest.approx(signal, rel=0.5)
    assert found.noise == pytest.approx(noise, rel=0.4)


def test_identical_batches_have_no_noise():
    found = compare(batches_of(1.0, 0.0)[:1] * 2, 1e-3, seed=2)
    assert (found.noise, found.ratio) == (0.0, math.inf)


# -- all of it --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuning() -> Tuning:
    return measure(batches_of(1.0, 0.25), seed=1, num_directions=16)


def test_everything_is_measured_in_so_many_probes(tuning: Tuning):
    batches = batches_of(1.0, 0.25)
    assert measure(batches, seed=1, num_directions=16) == tuning  # a pure function
    assert tuning.probes == sum(len(points) for batch in batches for points in batch.rounds)
    assert tuning.probes == 73 + 145 + 6 * 16 + 1 + 32 * 4
    assert tuning.curvature.trace == pytest.approx(20, rel=0.2)
    assert tuning.curvature.effective_rank == pytest.approx(200, rel=0.4)


def test_the_advice_follows_from_the_measurements(tuning: Tuning):
    epsilon, lr, what = advise(tuning)
    assert (epsilon.option, lr.option, what.option, what.value) == ("epsilon", "lr", "raise", "queries")
    assert float(epsilon.value) == pytest.approx(tuning.best.epsilon, rel=1e-2)
    ratio = tuning.batches.ratio
    curvature = tuning.curvature
    steepest = curvature.trace + 2 * curvature.trace_error + 2 * curvature.largest_eigenvalue
    assert float(lr.value) == pytest.approx(1 / (steepest * (1 + 1 / ratio)), rel=1e-2)
    most = steepest / curvature.largest_eigenvalue
    assert f"q directions allow {most:.3g} q / ({most - 1:.3g} + q) times that" in lr.reason


def test_the_learning_rate_that_is_recommended_is_the_best_one():
    """Of the expected decrease on the shared objective, by steps along directions probed on one batch."""
    batches = batches_of(1.0, 1.0, count=8)
    found = measure(batches, seed=1, num_directions=32)
    recommended = float(advise(found)[1].value)
    z = torch.stack([batches[0].direction(seed) for seed in range(800)])
    theta = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    gradients = [torch.autograd.grad(batch.function(theta), theta)[0] for batch in batches]
    mean = torch.stack(gradients).mean(0)

    def decrease(lr: float) -> float:
        moved = -lr * (z @ gradients[0])[:, None] * z
        return -float((moved @ mean + 0.05 * moved.square().sum(1)).mean())

    assert decrease(recommended) > max(decrease(recommended / 4), decrease(recommended * 4))


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"batches": BatchNoise(1e-3, ((1.0, 2.0), (-1.0, 1.0)), signal=0.5, noise=2.0)}, "batch size"),
        ({"noise_floor": 1.0, "batches": BatchNoise(1e-3, ((1.0, 2.0), (1.0, 1.0)), signal=0.5, noise=2.0)}, "epsilon"),
        ({"batches": BatchNoise(1e-3, ((1.0, 2.0), (1.0, 2.0)), signal=2.5, noise=0.0)}, "queries"),
        ({"batches": BatchNoise(1e-3, ((1.0, 2.0), (-1.0, 1.0)), signal=0.0, noise=2.0)}, "batch size"),
    ],
)
def test_what_to_raise(tuning: Tuning, changes: dict, value: str):
    changed = replace(tuning, **changes)
    assert advise(changed)[2].value == value
    assert picture(changed) is not None
    assert all(advice.reason for advice in advise(changed))


def test_advice_where_nothing_can_be_seen():
    drowned = measure([shaken(batch, 10.0) for batch in batches_of(1e-6, 0.0)], seed=1, num_directions=8)
    epsilon, lr, _ = advise(drowned)
    assert "rough" in epsilon.reason
    assert lr.value == "n/a" or "cautious" in lr.reason
    flat = ClosedForm(Gaussian(), torch.zeros(3, dtype=torch.float64), lambda x: (0 * x).sum())
    epsilon, lr, _ = advise(measure([flat, flat], num_directions=8))
    assert "100% of the samples tie" in epsilon.reason
    assert lr.value == "n/a"


def test_a_smooth_objective_is_not_called_rough(tuning: Tuning):
    steps = ClosedForm(Gaussian(), torch.zeros(4, dtype=torch.float64), lambda x: torch.round(20 * x).sum())
    rough = measure([steps, steps], num_directions=8)
    assert (tuning.rough, rough.rough) == (False, True)


def test_table_and_picture(tuning: Tuning, tmp_path):
    text = io.StringIO()
    Console(file=text, width=120).print(table(tuning))
    for word in ("noise floor", "effective rank", "largest stable lr", "signal to noise", "epsilon", "raise"):
        assert word in text.getvalue()
    picture(tuning).savefig(tmp_path / "tuning.png")
    assert (tmp_path / "tuning.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": batches_of(1.0, 1.0, 1)}, "batches: 1 given, but at least 2 are needed"),
        ({"batches": batches_of(1.0, 1.0), "num_directions": 4}, "num_directions=4 must be at least 8"),
        ({"batches": batches_of(1.0, 1.0), "epsilons": (1e-3, 1e-2)}, "must be at least three positive numbers"),
        ({"batches": batches_of(1.0, 1.0), "epsilons": (1e-2, 1e-3, 1e-4)}, "in ascending order"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        measure(**arguments)


def test_an_objective_without_values_is_refused_with_the_reason():
    def nothing(points: Sequence[Point]) -> Evaluation:
        return Evaluation.of(points, [Samples.of(torch.tensor([math.nan])) for _ in points], 0.5)

    with pytest.raises(ValueError, match="the objective cannot be measured: the objective is not finite at point"):
        measure([nothing, nothing])


def test_nothing_is_left_in_the_weights():
    torch.manual_seed(0)
    model, x = nn.Linear(8, 4).to(torch.bfloat16), torch.randn(16, 8, dtype=torch.bfloat16)
    before = [parameter.data.clone() for parameter in model.parameters()]
    evaluator = Copy(MeZO(model.named_parameters()).space)
    batches = [evaluator(lambda part=part: model(part).float().square().mean(1)) for part in x.split(8)]
    assert np.isfinite(measure(batches, num_directions=8).noise_floor)
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.data, old)
