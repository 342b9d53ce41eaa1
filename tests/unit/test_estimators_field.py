"""The estimators beyond MeZO's: each against its published algorithm, its stated bias, and what all of them promise."""

import copy
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import fmean, pstdev

import pytest
import torch
import torch.nn.functional as F
from closed_form import ClosedForm, Quadratic
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from mezo_lightning.estimators.base import Estimator
from mezo_lightning.estimators.central import CentralDifference
from mezo_lightning.estimators.fzoo import FZOO
from mezo_lightning.estimators.greedy import GreedyDirection
from mezo_lightning.estimators.guided import GuidingVector
from mezo_lightning.estimators.one_sided import ForwardDifference
from mezo_lightning.estimators.population import Population, centered_ranks
from mezo_lightning.evaluators import Copy, Evaluation, Samples
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.measurements import step_record
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, LaneSampler, Rademacher, Sampler, derive_seed
from mezo_lightning.steps import Point
from mezo_lightning.transforms import Chain, Clip, Sign, Standardize

EPSILON = 2.0**-7  # has few bits: no rounding of coefficients stands between us and the published algorithms
Loss = Callable[[Tensor], float]

# -- the published algorithms, written out with the noise in memory; each returns the direction of descent -------------


def plain_forward(loss: Loss, theta: Tensor, z: Sequence[Tensor]) -> Tensor:
    here = loss(theta)
    return sum(((loss(theta + EPSILON * zi) - here) / EPSILON * zi for zi in z), torch.zeros(())) / len(z)


def plain_guided(loss: Loss, theta: Tensor, z: Sequence[Tensor], match_norm: bool) -> Tensor:
    ranked = sorted(z, key=lambda zi: loss(theta + EPSILON * zi))
    half = len(z) // 2
    v = torch.stack(ranked[:half]).mean(0) - torch.stack(ranked[half:]).mean(0)
    if match_norm:
        v = v / math.sqrt(2 / half)
    return (loss(theta + EPSILON * v) - loss(theta - EPSILON * v)) / (2 * EPSILON) * v


def plain_greedy(loss: Loss, theta: Tensor, z: Sequence[Tensor]) -> Tensor:
    v = min(z, key=lambda zi: loss(theta + EPSILON * zi))
    return (loss(theta + EPSILON * v) - loss(theta - EPSILON * v)) / (2 * EPSILON) * v


def plain_fzoo(loss: Loss, theta: Tensor, z: Sequence[Tensor]) -> Tensor:
    here, values = loss(theta), torch.tensor([loss(theta + EPSILON * zi) for zi in z])
    sigma = values.std(correction=0)
    return sum((values[i] - here) / (len(z) * sigma) * zi for i, zi in enumerate(z))  # pyright: ignore


def plain_es(loss: Loss, theta: Tensor, z: Sequence[Tensor]) -> Tensor:
    rewards = torch.tensor([-loss(theta + EPSILON * zi) for zi in z])
    scores = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-8)
    return -sum(scores[i] * zi for i, zi in enumerate(z)) / len(z)  # pyright: ignore


def plain_ranked_es(loss: Loss, theta: Tensor, z: Sequence[Tensor]) -> Tensor:
    members = [way * zi for zi in z for way in (1, -1)]
    rewards = torch.tensor([-loss(theta + EPSILON * member) for member in members])
    ranks = rewards.argsort().argsort() / (len(members) - 1) - 0.5
    return -sum(ranks[i] * member for i, member in enumerate(members)) / len(members)  # pyright: ignore


CASES = {
    "forward": (ForwardDifference(EPSILON, 3), 4, 3, plain_forward),
    "guided": (GuidingVector(EPSILON, 6), 8, 6, lambda *a: plain_guided(*a, match_norm=True)),
    "guided, as published": (
        GuidingVector(EPSILON, 8, match_norm=False),
        10,
        8,
        lambda *a: plain_guided(*a, match_norm=False),
    ),
    "greedy": (GreedyDirection(EPSILON, 5), 7, 5, plain_greedy),
    "fzoo": (FZOO(EPSILON, 8), 9, 8, plain_fzoo),
    "es": (Population(EPSILON, 6), 6, 6, plain_es),
    "ranked es": (Population(EPSILON, 8, antithetic=True, fitness="centered_rank"), 8, 4, plain_ranked_es),
}
each = pytest.mark.parametrize("name", CASES)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embed(ids))))


def build(dtype: torch.dtype = torch.float32, lr: float = 0.05, sampler: Sampler | None = None) -> tuple[Net, MeZO]:
    torch.manual_seed(0)
    model = Net().to(dtype)
    return model, MeZO(model.named_parameters(), lr=lr, sampler=sampler)


def losses(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).double(), targets, reduction="none")


@pytest.mark.parametrize("kind", ["copy", "leaf"])
@each
def test_three_steps_are_those_of_the_published_algorithm(name: str, kind: str):
    estimator, _, directions, published = CASES[name]
    model, optimizer = build()
    plain = copy.deepcopy(model)
    torch.manual_seed(1)
    ids, targets = torch.randint(9, (64,)), torch.randint(9, (64,))
    evaluator = Copy(optimizer.space) if kind == "copy" else LeafScratch(model, optimizer.space)
    theta = nn.utils.parameters_to_vector(plain.parameters()).detach()

    def loss(flat: Tensor) -> float:
        nn.utils.vector_to_parameters(flat, plain.parameters())
        return float(losses(plain, ids, targets).mean())

    for step in range(3):
        before = nn.utils.parameters_to_vector(model.parameters()).detach()
        estimate = estimator.estimate(evaluator(lambda: losses(model, ids, targets)), seed=step)
        optimizer.step(estimate=estimate)
        moved = nn.utils.parameters_to_vector(model.parameters()).detach() - before
        z = [Gaussian().fill(torch.empty(theta.numel()), derive_seed(step, i), 0) for i in range(directions)]
        with torch.no_grad():
            expected = -0.05 * published(loss, before, z)
        # 12 bits of each coefficient, and the rounding errors of fp32 losses, divided by epsilon.
        assert float((moved - expected).norm() / expected.norm()) < 3e-3


@each
def test_probes_are_counted_exactly(name: str):
    estimator, probes, directions, _ = CASES[name]
    quadratic = Quadratic(Gaussian())
    estimate = estimator.estimate(quadratic, seed=3)
    assert sum(map(len, quadratic.rounds)) == probes
    pooled = isinstance(estimator, GuidingVector | GreedyDirection)
    assert [len(points) for points in quadratic.rounds] == ([directions, 2] if pooled else [probes])
    seeds = {derive_seed(3, i) for i in range(directions)}
    assert {seed for points in quadratic.rounds for point in points for seed, _ in point.terms} == seeds
    assert set(estimate.seeds) <= seeds
    labels = [point.label for points in quadratic.rounds for point in points]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("scalars", [Chain([]), Clip(1e-2), Standardize(), Sign()])
@pytest.mark.parametrize("match_norm", [True, False])
@pytest.mark.parametrize("pool_size", [4, 6, 8, 10])
def test_the_guiding_vector_that_was_probed_is_the_one_that_is_applied(pool_size: int, match_norm: bool, scalars):
    """To the last bit, whatever the rounding of coefficients and whatever a transform does to the scalars."""
    model, optimizer = build(lr=0.0123)
    rounds: list[Sequence[Point]] = []

    def evaluate(points: Sequence[Point]) -> Evaluation:
        rounds.append(points)
        return Copy(optimizer.space)(lambda: losses(model, torch.arange(9), torch.arange(9)))(points)

    estimate = GuidingVector(1e-3, pool_size, match_norm).estimate(evaluate, seed=1)
    step = optimizer._make_step(optimizer.memory, scalars(estimate))
    probed, back = (dict(point.terms) for point in rounds[1])
    assert probed == {seed: -c for seed, c in back.items()}
    assert [seed for seed, _ in step.terms] == list(probed) == list(estimate.seeds)
    ratios = {Fraction(c) / Fraction(probed[seed]) for seed, (c,) in step.terms}
    assert len(ratios) == 1
    assert ratios != {0}


def test_a_forward_difference_on_a_quadratic_has_the_stated_error():
    quadratic = Quadratic(Gaussian())
    estimate = ForwardDifference(0.25, 5).estimate(quadratic, seed=2)
    assert estimate.pairs == tuple((query, 0) for query in range(1, 6))
    for seed, projected_grad in zip(estimate.seeds, estimate.projected_grads, strict=True):
        z = quadratic.direction(seed)
        expected = float(quadratic.gradient() @ z + 0.125 * z @ quadratic.a @ z)
        assert projected_grad == pytest.approx(expected, rel=1e-9, abs=1e-9)


def mean_estimate(estimator: Estimator, objective: ClosedForm, repeats: int) -> tuple[Tensor, Tensor]:
    """The mean over many seeds, and its standard error."""
    estimates = torch.stack([objective.dense(estimator.estimate(objective, seed=seed)) for seed in range(repeats)])
    return estimates.mean(0), estimates.std(0) / math.sqrt(repeats)


@pytest.mark.parametrize("sampler", [Gaussian(), Rademacher()])
def test_the_forward_difference_is_unbiased_on_a_quadratic(sampler: LaneSampler):
    quadratic = Quadratic(sampler, count=8)
    mean, error = mean_estimate(ForwardDifference(0.1, 2), quadratic, 500)
    assert bool(((mean - quadratic.gradient()).abs() < 4 * error).all())


@pytest.mark.parametrize(
    ("estimator", "factor"),
    [
        (GuidingVector(1e-4, 2), 1.00),
        (GuidingVector(1e-4, 4), 2.10),
        (GuidingVector(1e-4, 8), 4.56),
        (GuidingVector(1e-4, 8, match_norm=False), 2.28),
        (GreedyDirection(1e-4, 4), 1.55),
        (GreedyDirection(1e-4, 8), 2.40),
    ],
)
def test_the_mean_of_a_chosen_direction_is_the_gradient_times_the_stated_factor(estimator: Estimator, factor: float):
    gradient = torch.tensor([3.0, 0.0, -4.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    linear = ClosedForm(Gaussian(), torch.zeros(6, dtype=torch.float64), lambda x: gradient @ x)
    mean, error = mean_estimate(estimator, linear, 160)
    assert bool(((mean - factor * gradient).abs() < 4 * error).all())
    assert float(mean @ gradient / (gradient @ gradient)) == pytest.approx(factor, rel=0.3)


NORMALISED = ["fzoo", "es", "ranked es"]


@pytest.mark.parametrize("name", NORMALISED)
def test_a_normalised_estimate_forgets_the_scale_of_the_objective_and_where_it_begins(name: str):
    estimator = CASES[name][0]
    quadratic = Quadratic(Rademacher())
    changed = ClosedForm(Rademacher(), quadratic.theta, lambda x: 1000 * quadratic.function(x) - 7)
    first, second = (estimator.estimate(objective, seed=4) for objective in (quadratic, changed))
    assert first.seeds == second.seeds
    assert first.projected_grads == pytest.approx(second.projected_grads, rel=1e-6)


@pytest.mark.parametrize("name", NORMALISED)
def test_a_normalised_estimate_points_along_the_gradient_on_average(name: str):
    quadratic = Quadratic(Gaussian(), count=10)
    mean, _ = mean_estimate(CASES[name][0], quadratic, 150)
    assert float(F.cosine_similarity(mean, quadratic.gradient(), dim=0)) > 0.95


def test_the_size_of_a_step_of_fzoo_is_the_stated_one():
    quadratic = Quadratic(Rademacher(), count=512)
    estimate = FZOO(1e-2, 8).estimate(quadratic, seed=1)
    assert estimate.evaluation is not None
    here, *there = estimate.evaluation.means
    expected = math.sqrt(1 + ((fmean(there) - here) / pstdev(there)) ** 2) / math.sqrt(8)
    assert float(quadratic.dense(estimate).square().mean().sqrt()) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(("fitness", "expected"), [("z_score", 1.0), ("centered_rank", 0.29)])
def test_the_size_of_a_step_of_a_population_is_the_stated_one(fitness, expected: float):
    quadratic = Quadratic(Gaussian(), count=512)
    estimate = Population(1e-2, 30, fitness=fitness).estimate(quadratic, seed=1)
    size = float(quadratic.dense(estimate).square().mean().sqrt())
    assert size == pytest.approx(expected / math.sqrt(30), rel=0.15)


def test_at_a_pool_of_four_matching_the_norm_changes_nothing():
    quadratic = Quadratic(Gaussian())
    matched, published = (GuidingVector(1e-3, 4, match).estimate(quadratic, seed=1) for match in (True, False))
    assert (matched.projected_grads, matched.scale) == (published.projected_grads, published.scale)


def test_raw_antithetic_members_would_be_mezo():
    """The z-scores of pairs differ from central differences by one factor only."""
    quadratic = Quadratic(Gaussian())
    mezo = CentralDifference(EPSILON, 4).estimate(quadratic, seed=2)
    es = Population(EPSILON, 8, antithetic=True).estimate(quadratic, seed=2)
    assert es.seeds == mezo.seeds
    assert es.pairs == mezo.pairs
    ratios = [a / b for a, b in zip(es.projected_grads, mezo.projected_grads, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4)


# -- values that say nothing ------------------------------------------------------------------------------------------


def flat(values: Callable[[int, Point], Sequence[float]]) -> Callable[[Sequence[Point]], Evaluation]:
    """An objective that is made up: per-sample values by the number of the round and the point."""
    rounds = iter(range(9))

    def evaluate(points: Sequence[Point]) -> Evaluation:
        number = next(rounds)
        rows = [torch.tensor([values(number, point)], dtype=torch.float64).T for point in points]
        return Evaluation.of(points, [Samples(row.nan_to_num(), ~row.isnan()) for row in rows], 0.5)

    return evaluate


@pytest.mark.parametrize("name", [name for name in CASES if name != "forward"])
def test_a_tie_throughout_is_a_skipped_step(name: str):
    orders = {"c1+": (0.3, 0.1, 0.2), "q1+": (0.2, 0.3, 0.1)}  # one mean on paper, and another in its last bit
    estimate = CASES[name][0].estimate(flat(lambda _, point: orders.get(point.label, (0.1, 0.2, 0.3))), seed=1)
    assert estimate.skipped is not None
    assert "the same value" in estimate.skipped
    assert estimate.seeds == ()
    record = step_record(estimate, 1, [0.1], 1.0)
    assert record.skipped == estimate.skipped


def test_a_forward_difference_that_ties_is_zero():
    estimate = ForwardDifference(1e-3, 3).estimate(flat(lambda *_: (1.0,)), seed=1)
    assert estimate.projected_grads == (0.0, 0.0, 0.0)
    assert estimate.skipped is None


def test_probes_that_tie_far_from_the_start_have_no_spread():
    values = {f"q{i}+": (float(i),) for i in range(4)} | {"theta": (1e20,)}
    estimate = FZOO(1e-3, 4).estimate(flat(lambda _, point: values[point.label]), seed=1)
    assert estimate.skipped is not None


@pytest.mark.parametrize("failing_round", [0, 1])
@each
def test_what_cannot_be_estimated_is_skipped_with_the_reason(name: str, failing_round: int):
    def values(number: int, point: Point) -> Sequence[float]:
        value = math.nan if number == failing_round else float(sum(seed % 97 for seed, _ in point.terms))
        return value, value

    estimate = CASES[name][0].estimate(flat(values), seed=1)
    if failing_round and not estimate.earlier:  # there is one round only
        assert estimate.skipped is None
        return
    assert estimate.skipped is not None
    assert estimate.skipped.startswith("0 of 2 samples have a value at every point")
    assert estimate.seeds == estimate.projected_grads == ()
    assert step_record(estimate, 1, [0.1], 1.0).skipped == estimate.skipped


def test_ranks_are_centred_and_ties_share_theirs():
    assert centered_ranks([3.0, 1.0, 2.0]) == [0.5, -0.5, 0.0]
    assert centered_ranks([1.0, 0.0, 1.0, 1.0, 5.0]) == [0.0, -0.5, 0.0, 0.0, 0.5]
    assert centered_ranks([0.0, -0.0]) == [0.0, 0.0]


@pytest.mark.parametrize("estimator", [GuidingVector(0.5, 4), GreedyDirection(0.5, 4)])
def test_a_later_round_does_not_reopen_the_ranking(estimator: Estimator):
    """Sample 0 decides on the ranking and fails afterwards; the others would rank the other way round."""
    first = {f"c{i}+": (100.0 * i, -1.0 * i, -1.0 * i) for i in range(4)}
    second = {"v+": (math.nan, 3.0, 4.0), "v-": (7.0, 1.0, 1.0)}
    estimate = estimator.estimate(flat(lambda number, point: (first, second)[number][point.label]), seed=1)
    best_first = tuple(derive_seed(1, i) for i in range(4))
    assert estimate.seeds == best_first[: len(estimate.seeds)]
    assert abs(estimate.projected_grads[0]) == pytest.approx(2.5)  # (3.5 - 1) / (2 epsilon), without sample 0
    assert len(estimate.earlier) == 1
    assert bool(estimate.earlier[0].valid.all())


def test_a_sample_that_fails_at_one_candidate_has_no_part_in_the_ranking():
    values = {"c0+": (9.0, 1.0, 1.0), "c1+": (0.0, 2.0, 2.0), "c2+": (5.0, 3.0, 3.0), "c3+": (math.nan, 4.0, 4.0)}
    evaluate = flat(lambda number, point: values[point.label] if number == 0 else (1.0, 1.0, 2.0))
    estimate = GreedyDirection(0.5, 4).estimate(evaluate, seed=1)
    assert estimate.seeds == (derive_seed(1, 0),)


# -- what all estimators promise --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each
def test_lr_0_leaves_no_trace(name: str, dtype: torch.dtype):
    model, optimizer = build(dtype, lr=0.0)
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = -0.0
    before = [parameter.data.clone().view(torch.uint8) for parameter in model.parameters()]
    evaluator, estimates, calls = Copy(optimizer.space), [], 0

    def objective() -> Samples:
        nonlocal calls
        calls += 1
        if calls % 41 == 0:
            raise ConnectionError
        values = losses(model, torch.arange(9), torch.arange(9))[:, None]
        return Samples(values, torch.rand(values.shape) > (0.9 if calls % 29 == 0 else 0.02))

    for step in range(20):
        try:
            estimate = CASES[name][0].estimate(evaluator(objective), seed=step)
        except ConnectionError:
            continue
        estimates.append(estimate)
        optimizer.step(estimate=estimate)
    assert sum(estimate.skipped is None for estimate in estimates) > 5
    for parameter, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter.data.view(torch.uint8), old)


@each
def test_the_record_of_a_step_has_its_values(name: str):
    estimate = CASES[name][0].estimate(Quadratic(Gaussian()), seed=1)
    assert estimate.evaluation is not None
    assert all(0 <= place < len(estimate.evaluation.points) for pair in estimate.pairs for place in pair)
    record = step_record(estimate, 1, [0.1], 2.0)
    assert record.projected_grads == list(estimate.projected_grads)
    assert all(math.isfinite(value) for value in record.objective.values())
    assert record.tie_fraction == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        *(
            (lambda kind=kind: kind(epsilon=0.0), "epsilon=0.0 must be")
            for kind in (ForwardDifference, GuidingVector, GreedyDirection, FZOO, Population)
        ),
        (lambda: ForwardDifference(num_queries=0), "num_queries=0 must be at least 1"),
        (lambda: FZOO(num_queries=1), "num_queries=1 must be at least 2"),
        (lambda: GreedyDirection(pool_size=1), "pool_size=1 must be at least 2"),
        (lambda: GuidingVector(pool_size=5), "pool_size=5 must be an even number, at least 2"),
        (lambda: Population(population_size=1), "population_size=1 must be at least 2"),
        (lambda: Population(population_size=7, antithetic=True), "population_size=7 must be an even number"),
        (lambda: Population(fitness="rank"), "fitness='rank' must be 'z_score' or 'centered_rank'"),  # pyright: ignore
    ],
)
def test_wrong_options_are_refused_by_name(make: Callable[[], Estimator], message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("estimator", [case[0] for case in CASES.values()], ids=CASES)
def test_each_is_chosen_by_its_class_name(estimator: Estimator):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Estimator, "estimator")
    words = [f"--estimator={type(estimator).__name__}"]
    words += [f"--estimator.{name}={value}" for name, value in vars(estimator).items()]
    assert parser.instantiate_classes(parser.parse_args(words))["estimator"] == estimator
