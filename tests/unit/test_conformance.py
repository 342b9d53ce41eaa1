"""What every estimator, sampler, update and parameter space promises, in every supported pair of them.

``conformance.py`` declares what combines. A property is a function over its combinations; those of one part alone are
over that part.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from closed_form import ClosedForm, table_of
from conformance import (
    AXES,
    COMBINATIONS,
    EPSILON,
    ESTIMATORS,
    EVALUATORS,
    IMPLIED,
    REFUSED,
    ROWS,
    SAMPLERS,
    SHARES,
    UPDATES,
    Combination,
    Run,
    choices,
    completed,
    pairs,
    same_bits,
    seeds_of,
    with_every_part,
)
from torch import Tensor, nn

import mezo_lightning
from mezo_lightning import parameters, samplers
from mezo_lightning.dense import DenseAdam, DenseMomentum
from mezo_lightning.estimators import Cone, Estimator
from mezo_lightning.evaluators import Copy, Evaluator, Samples
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterInfo, ParameterSpace, Slice
from mezo_lightning.rowwise.points import RowPoint, row_seed
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Sampler, derive_seed
from mezo_lightning.scaled import ScaledByNorm
from mezo_lightning.shards import Shard
from mezo_lightning.steps import GradientEstimate, Point, Step, round_coefficient, round_fp32
from mezo_lightning.structured import LowRank
from mezo_lightning.trajectory import Header, Trajectory, replay
from mezo_lightning.updates import Update

STEPS, RESUMED_AT = 3, 1  # the factors of some samplers are drawn anew after step 2

PARTS = with_every_part()
MARKS = {of: () if of in PARTS else pytest.mark.slow for of in COMBINATIONS}
each = pytest.mark.parametrize("of", [pytest.param(of, id=str(of), marks=marks) for of, marks in MARKS.items()])
each_part = pytest.mark.parametrize("of", PARTS, ids=str)
each_sampler = pytest.mark.parametrize("name", SAMPLERS)
each_estimator = pytest.mark.parametrize("name", ESTIMATORS)


@pytest.fixture(scope="module", autouse=True)
def _small_chunks() -> Iterator[None]:
    """Chunks of fewer elements than a model has: they end within parameters, and small ones are filled quickly."""
    with chunks_of(64):
        yield


@contextmanager
def chunks_of(numel: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (parameters, samplers):
            patch.setattr(module, "chunk_numel", lambda device: numel)
        patch.setattr(samplers, "_workspaces", samplers._Workspaces())
        yield


# -- the table ---------------------------------------------------------------------------------------------------------


def evaluator_of(name: str) -> Evaluator:
    sampler = "flipout" if frozenset({name, "gaussian"}) in REFUSED else "gaussian"
    return Run(Combination(sampler=sampler, evaluator=name)).evaluator


@pytest.mark.parametrize(
    ("base", "listed"),
    [
        (Estimator, {type(rule.estimator) for rule in ESTIMATORS.values()}),
        (Sampler, {type(sampler) for sampler in SAMPLERS.values()}),
        (Update, {type(options["update"]) for options in UPDATES.values() if "update" in options}),
        (Evaluator, {type(evaluator_of(name)) for name in EVALUATORS}),
    ],
)
def test_no_public_part_is_missing_from_the_table(base: type, listed: set[type]):
    public = [getattr(mezo_lightning, name) for name in mezo_lightning.__all__]
    assert {part for part in public if isinstance(part, type) and issubclass(part, base)} == listed


def test_every_pair_is_in_a_combination_or_refused():
    covered = {pair for of in COMBINATIONS for pair in combinations(choices(of), 2)}
    names = [name for axis in AXES.values() for name in axis]
    assert len(set(names)) == len(names)  # a refusal names its parts without their axes
    assert all(refused <= set(names) for refused in REFUSED)
    for pair in pairs():
        assert (pair in covered) != (frozenset(name for _, name in pair) in REFUSED.keys() | IMPLIED), pair
    assert not any(completed(chosen(names), lambda *_: 0) for names in IMPLIED)


def chosen(names: frozenset[str]) -> dict[str, str]:
    """Names with their axes."""
    return {axis: name for axis, known in AXES.items() for name in names if name in known}


@pytest.mark.parametrize("names", REFUSED, ids=lambda names: " | ".join(sorted(names)))
def test_what_does_not_combine_says_so(names: frozenset[str]):
    with pytest.raises(ValueError, match=REFUSED[names]):
        Run(most_possible(names)).take(1)


def most_possible(names: frozenset[str]) -> Combination:
    """A combination with a refused pair in which nothing else is to blame, as far as that can be."""
    result = Combination(**chosen(names))
    for axis in AXES.keys() - chosen(names).keys():
        blamed = {name: sum(frozenset({name, other}) in REFUSED for other in names) for name in AXES[axis]}
        result = replace(result, **{axis: min(AXES[axis], key=blamed.__getitem__)})
    return result


# -- runs --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A run that made its steps, and what it left behind."""

    run: Run
    log: Path
    middle: list[Tensor]
    """The weights at ``RESUMED_AT``."""
    saved: bytes
    """The run's state then."""
    weights: list[Tensor]
    steps: list[Step]


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Combination], Finished]:
    """Gives the run of a combination, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def made(of: Combination) -> Finished:
        run, path = Run(of), folder / f"{COMBINATIONS.index(of)}.bin"
        with Trajectory.create(path, Header.of(run.optimizer.space)) as log:
            run.optimizer.trajectory = log
            run.take(RESUMED_AT)
            middle, saved = run.weights(), run.saved()
            run.take(STEPS - RESUMED_AT)
            return Finished(run, path, middle, saved, run.weights(), list(log))

    return made


Finish = Callable[[Combination], Finished]


@each
def test_a_run_asks_for_exactly_the_stated_probes(of: Combination, finish: Finish):
    finished, rule = finish(of), ESTIMATORS[of.estimator]
    assert [len(points) for points in finished.run.points] == list(rule.rounds) * STEPS
    for number in range(STEPS):
        rounds = finished.run.points[number * len(rule.rounds) :][: len(rule.rounds)]
        seeds = {seed for points in rounds for point in points for seed in seeds_of(point)}
        assert len(seeds) == rule.directions + number * rule.further
        applied = [seed for seed, _ in finished.steps[number].terms]
        assert set(applied if "momentum" not in of.update else applied[:1]) <= seeds
    assert not same_bits(finished.weights, Run(of).weights())


@each
def test_the_direction_that_was_evaluated_is_the_one_that_is_applied(of: Combination, tmp_path: Path):
    """To the last bit, at a step that is not the first, against arithmetic on the directions that the model saw."""
    by_row = of.estimator.startswith("grzo")
    run = Run(replace(of, precision="fp32", evaluator=of.evaluator if by_row else "copy"))
    start = run.weights()
    with Trajectory.create(tmp_path / "log", Header.of(run.optimizer.space)) as log:
        run.optimizer.trajectory = log
        run.take(2)
        seen: list[list[Tensor]] = []

        def watched() -> Tensor:
            seen.append(run.weights())
            return run.losses()

        before, run.points = run.weights(), []
        run.objective = run.losses if by_row else watched
        estimate = run.estimate()
        points = [point for points in run.points for point in points]
        z = directions_seen(run, {seed for point in points for seed in seeds_of(point)} | {s for s, _ in log[1].terms})
        if by_row:
            check_rows(run, points, estimate, z)
        else:
            for point, weights in zip(points, seen, strict=True):
                assert same_bits(weights, moved(before, [(z[seed], c) for seed, c in point.terms]))
        moments = [state.clone() for state in run.optimizer.space.moments or ()]
        run.optimizer.step(estimate=estimate)
        step = log[2]
    check_terms(run, estimate, step.terms)
    along = [(z[seed], c) for seed, c in step.terms]
    expected = stepped(run, start, before, along) if not moments else moved_by_rule(run, before, moments, along, step)
    assert same_bits(run.tensors(), expected)
    assert not (any(estimate.projected_grads) and same_bits(run.tensors(), before))


def check_rows(run: Run, points: Sequence[Point], estimate: GradientEstimate, z: dict[int, list[Tensor]]) -> None:
    """Each row's value is that of a model which has the row's weights."""
    assert estimate.evaluation is not None
    before = run.weights()
    for point, values in zip(points, estimate.evaluation.values, strict=True):
        assert isinstance(point, RowPoint)
        for row, value in enumerate(values.tolist()):
            set_weights(run, moved(before, [(z[row_seed(point.seed, row)], point.coefficient)]))
            with torch.no_grad():
                assert float(run.losses()[row]) == pytest.approx(value, abs=1e-5)
    set_weights(run, before)


def check_terms(run: Run, estimate: GradientEstimate, terms: Sequence[tuple[int, tuple[float, ...]]]) -> None:
    """The newest terms of a step are the estimate, times the rate or whatever an update makes of it."""
    rates = [float(group["lr"]) for group in run.optimizer.param_groups]
    newest = terms[: len(estimate.seeds)]
    assert [seed for seed, _ in newest] == list(estimate.seeds)
    gradient = [estimate.scale * g for _, g in estimate.terms]
    if run.optimizer.update is None or run.optimizer.space.rule is not None:
        factors = [-lr for lr in rates] if run.optimizer.update is None else [1.0] * len(rates)
        assert [c for _, c in terms] == [tuple(round_coefficient(f * g) for f in factors) for g in gradient]
        return
    if not any(gradient):  # a tie
        assert not any(c for _, coefficients in newest for c in coefficients)
        return
    size = -sum(c[0] * g for (_, c), g in zip(newest, gradient, strict=True)) / (
        rates[0] * sum(g * g for g in gradient)
    )
    assert size > 0
    for (_, coefficients), g in zip(newest, gradient, strict=True):
        assert coefficients == pytest.approx([-lr * size * g for lr in rates], rel=2**-10)


Along = Sequence[tuple[list[Tensor], tuple[float, ...]]]
"""Directions, and a coefficient of each for every parameter group."""


def stepped(run: Run, start: list[Tensor], before: list[Tensor], terms: Along) -> list[Tensor]:
    """The weights after a step, by the formula of ``Step``, each sum rounded once a term."""
    result, towards_start = [], run.optimizer.decay_towards == "start"
    decays = [round_fp32(float(group["lr"]) * float(group["weight_decay"])) for group in run.optimizer.param_groups]
    for at, piece in enumerate(run.optimizer.space.slices):
        decay = decays[piece.info.group]
        mine = [([z[at]], coefficients[piece.info.group]) for z, coefficients in terms]
        if not any(decays):
            result += moved([before[at]], mine)
            continue
        away = before[at] - start[at] if towards_start else before[at]
        [change] = moved([away * -decay if decay else torch.full_like(away, -0.0)], mine)
        result.append(before[at] + change)
    return result


def moved_by_rule(run: Run, before: list[Tensor], moments: list[Tensor], terms: Along, step: Step) -> list[Tensor]:
    """The weights after a step of an update with dense moments, by its formula."""
    result, rule = [], run.optimizer.update
    for at, piece in enumerate(run.optimizer.space.slices):
        group = piece.info.group
        [gradient] = moved(
            [torch.zeros_like(before[at])], [([z[at]], coefficients[group]) for z, coefficients in terms]
        )
        if isinstance(rule, DenseAdam):
            first = moments[at][:, 0] * rule.beta1 + gradient * (1 - rule.beta1)
            second = moments[at][:, 1] * rule.beta2 + gradient.square() * (1 - rule.beta2)
            direction = first / (second.sqrt() + rule.zeta)
        else:
            assert isinstance(rule, DenseMomentum)
            direction = moments[at][:, 0] * rule.beta + gradient
        change = before[at] * -step.decays[group] - direction * step.rates[group]
        result.append(before[at] + change if any(step.decays) else before[at] - direction * step.rates[group])
    return result


def set_weights(run: Run, weights: Sequence[Tensor]) -> None:
    for tensor, value in zip(run.tensors(), weights, strict=True):
        tensor.copy_(value)


def moved(weights: list[Tensor], terms: Sequence[tuple[list[Tensor], float]]) -> list[Tensor]:
    """Weights plus the sum of c z, rounded once a term."""
    result = [tensor.clone() for tensor in weights]
    for z, coefficient in terms:
        for tensor, direction in zip(result, z, strict=True):
            if coefficient:
                tensor.add_(direction, alpha=coefficient)
    return result


def directions_seen(run: Run, seeds: set[int]) -> dict[int, list[Tensor]]:
    """The directions, exactly, as a model is evaluated so far along them that nothing is left of its weights."""
    before, found, far = run.weights(), {}, 2.0**60
    for point in Copy(run.optimizer.space).visit([Point(((seed, far),)) for seed in sorted(seeds)]):
        moved_far = [(now / far).masked_fill(now == then, 0.0) for now, then in zip(run.weights(), before, strict=True)]
        found[point.terms[0][0]] = moved_far
    return found


@pytest.mark.parametrize(
    "of", [of for of in COMBINATIONS if of.evaluator != "copy" and "grzo" not in of.estimator], ids=str
)
def test_every_evaluator_sees_the_values_that_a_copy_of_the_model_has(of: Combination, finish: Finish):
    finished = finish(of)
    copied = Run(replace(of, evaluator="copy"))
    copied.take(STEPS)
    assert copied.points == finished.run.points
    assert same_bits(copied.weights(), finished.weights)


@each
def test_a_resumed_run_equals_an_uninterrupted_one(of: Combination, finish: Finish):
    """By what is in a file, on a model that has just been built."""
    finished, resumed = finish(of), Run(of)
    resumed.load(finished.saved)
    resumed.take(STEPS - RESUMED_AT)
    assert resumed.points == finished.run.points[-len(resumed.points) :]
    assert same_bits(resumed.weights(), finished.weights)


@each
def test_base_and_log_give_the_same_bytes(of: Combination, finish: Finish):
    finished = finish(of)
    for stop, expected in ((RESUMED_AT, finished.middle), (STEPS, finished.weights)):
        base = Run(of)
        with Trajectory.open(finished.log) as log:
            assert log.header.make_sampler() == SAMPLERS[of.sampler]
            replay(base.model, log, stop=stop)
        assert same_bits(base.weights(), expected)


@each
def test_any_cut_into_shards_and_chunks_gives_the_same_bytes(of: Combination, finish: Finish):
    """Of the weights after the run, and of those at a point that a model may be evaluated at."""
    finished = finish(of)
    point = Point(tuple((seed, EPSILON) for seed, _ in finished.steps[-1].terms))
    base = Run(of).optimizer.space
    pieces = [cut(piece.info, piece.parameter) for piece in base.slices]
    ranks: list[list[list[Tensor]]] = []
    with chunks_of(28):
        for rank in range(3):
            named = [(piece.info.name, shards[rank]) for piece, shards in zip(base.slices, pieces, strict=True)]
            space = ParameterSpace.of(named, [p.info.group for p in base.slices], base.sampler, base.rounding)
            space.step_number = finished.run.optimizer.space.step_number
            space.apply(finished.steps)
            held = [shard.data for _, shard in named]
            ranks.append([*copies_at(space, point, held), [tensor.clone() for tensor in held]])
    whole = [*copies_at(finished.run.optimizer.space, point, finished.run.tensors()), finished.weights]
    for expected, *parts in zip(whole, *ranks, strict=True):
        assert same_bits([torch.cat(shards) for shards in zip(*parts, strict=True)], expected)


def copies_at(space: ParameterSpace, point: Point, held: Sequence[Tensor]) -> list[list[Tensor]]:
    """What tensors of a space hold while it is at a point."""
    return [[tensor.clone() for tensor in held] for _ in Copy(space).visit([point])]


def cut(info: ParameterInfo, parameter: Tensor) -> list[Shard]:
    """A parameter in three pieces at places of its own; a piece may be empty."""
    generator = torch.Generator().manual_seed(info.start)
    edges = [0, *sorted(torch.randint(info.numel + 1, (2,), generator=generator).tolist()), info.numel]
    flat = parameter.data.view(-1)
    return [Shard(flat[a:b].clone(), info.shape, a) for a, b in pairwise(edges)]


@each
def test_lr_0_leaves_no_trace(of: Combination):
    """Failing samples, rounds and objectives included; the weights hold a -0.0, which 0 times z would turn into 0.0."""
    run = Run(of)
    for group in run.optimizer.param_groups:
        group["lr"] = 0.0
    before = run.weights()
    run.objective = lambda: Samples(run.losses()[:, None], torch.arange(ROWS)[:, None] != 2)
    estimate = run.estimate()
    assert any(estimate.projected_grads)
    run.optimizer.step(estimate=estimate)
    assert same_bits(run.weights(), before)
    answers = [run.losses()]

    def unreliable() -> Tensor:
        if not answers:
            raise ConnectionError
        return answers.pop()

    run.objective = unreliable
    with pytest.raises(ConnectionError):
        run.estimate()
    assert same_bits(run.weights(), before)


FEW = ("biases", "scales")
"""Spaces of so few parameters that the loss hardly moves at the rate of the others."""


@each_part
def test_a_run_lowers_its_own_loss(of: Combination):
    """By the steps of a real optimizer, whatever the estimator, update, space, precision and evaluator are."""
    run = Run(of, lr=0.1 if of.space in FEW else 0.02)
    found = []
    for steps in (0, 10, 10):
        run.take(steps)
        found.append(float(run.losses().detach().mean()))
    assert found[0] > found[1] > found[2], found


@each_part
def test_a_step_that_cannot_be_estimated_leaves_no_trace_and_counts(of: Combination):
    run = Run(of)
    run.take(1)
    before, state, rounds = run.weights(), copy.deepcopy(run.optimizer.state_dict()), len(run.points)
    run.objective = lambda: Samples(torch.zeros(ROWS, 1), torch.zeros(ROWS, 1, dtype=torch.bool))
    estimate = run.estimate()
    assert estimate.skipped == "0 of 6 samples have a value at every point, fewer than 50%"
    assert (estimate.seeds, len(run.points)) == ((), rounds + 1)
    run.optimizer.step(estimate=estimate)
    assert same_bits(run.weights(), before)
    assert run.optimizer.space.step_number() == 2
    after = run.optimizer.state_dict()
    assert after["update"] == state["update"]
    assert same_bits([*after["beside"].values()], [*state["beside"].values()])


@each_estimator
def test_a_tie_throughout_leaves_no_trace(name: str):
    of = completed({"estimator": name}, lambda *_: 0)
    assert of is not None
    run = Run(of)
    before, run.objective = run.weights(), lambda: torch.full((ROWS,), 0.1)
    estimate = run.estimate()
    assert (estimate.skipped is not None) == (ESTIMATORS[name].tie == "skipped")
    run.optimizer.step(estimate=estimate)
    assert same_bits(run.weights(), before)


# -- samplers: exact, and the same whoever asks ------------------------------------------------------------------------

SHAPES = {"embed": (7, 4), "layers.0.w": (5, 4), "layers.0.b": (5,), "layers.1.w": (2, 3, 4), "norm": (3,)}


TABLE = table_of(SHAPES)
NUMEL = TABLE[-1].start + TABLE[-1].numel


def settled(name: str, table: Sequence[ParameterInfo]) -> Sampler:
    """A sampler on weights of a parameter table, whose blocks have norms that differ."""
    numel, generator = table[-1].start + table[-1].numel, torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(numel, generator=generator) * torch.linspace(1.0, 4.0, numel))
    slices = [Slice.of(info, weights[info.start : info.start + info.numel]) for info in table]
    return SAMPLERS[name].settled(slices, table)


@each_sampler
def test_any_cut_of_a_direction_gives_the_same_bits(name: str):
    directions = settled(name, TABLE).bind(TABLE)
    whole = directions.fill(torch.empty(NUMEL), 5, 0, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        cuts = sorted({0, NUMEL, *torch.randint(1, NUMEL, (9,), generator=generator).tolist()})
        parts = [directions.fill(torch.empty(b - a), 5, a, 4) for a, b in reversed(list(pairwise(cuts)))]
        assert torch.equal(torch.cat(parts[::-1]), whole)


@each_sampler
def test_rows_are_those_of_the_whole(name: str):
    directions = settled(name, TABLE).bind(TABLE)
    whole = directions.fill(torch.empty(NUMEL), 9, 0, 2)
    for info in TABLE[:2]:
        rows, width = torch.tensor([3, 0, 4, 3]), info.shape[1]
        expected = whole[info.start : info.start + info.numel].view(info.shape)[rows]
        assert torch.equal(directions.rows(9, rows * width + info.start, width, 2), expected)


@each_sampler
def test_elements_keep_12_significant_bits(name: str):
    mantissa, _ = torch.frexp(settled(name, TABLE).bind(TABLE).fill(torch.empty(NUMEL), 1, 0).double())
    assert torch.equal(mantissa * 2**12, (mantissa * 2**12).round())


@each_sampler
def test_settings_survive_their_record(name: str):
    for sampler in (SAMPLERS[name], settled(name, TABLE)):
        record = sampler_as_dict(sampler)
        assert sampler_from_dict(record) == sampler
        assert sampler_as_dict(sampler_from_dict(record)) == record  # equal ones may differ in what was found


@each_sampler
def test_the_size_of_a_step_is_told_where_coefficients_tell_it(name: str):
    """That of a step along many directions, and over many steps, for factors and blocks are drawn anew."""
    generator = torch.Generator().manual_seed(0)
    layers = [(f"layers.{i}.w", nn.Parameter(4.0**i * torch.randn(60, 50, generator=generator))) for i in range(2)]
    optimizer = MeZO(layers, 2.0**-10, sampler=SAMPLERS[name])
    moved, coefficients = [], []
    for step in range(12):
        before = torch.cat([tensor.detach().clone() for _, tensor in layers])
        optimizer.step(estimate=GradientEstimate(tuple(range(8 * step, 8 * step + 8)), (1.0,) * 8))
        moved.append(float((torch.cat([tensor.detach() for _, tensor in layers]) - before).square().mean()))
        coefficients.append(8 * 2.0**-20)
        told = optimizer.update_rms
        assert told == (pytest.approx(math.sqrt(coefficients[-1])) if SAMPLERS[name].unit_variance else None)
    as_told = sum(moved) == pytest.approx(sum(coefficients), rel=0.3)
    assert as_told == SAMPLERS[name].unit_variance


# -- estimates: bias and descent ---------------------------------------------------------------------------------------


SMALL: dict[str, tuple[int, ...]] = {"layers.0.w": (3, 2), "layers.1.w": (2, 2), "norm": (2,)}
GRADIENT = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()


def sampler_of(name: str) -> str:
    """A sampler that goes with an estimator."""
    return "gaussian" if frozenset({name, "gaussian"}) not in REFUSED else "flipout"


@functools.cache
def linear(sampler: Sampler) -> ClosedForm:
    """An objective that is linear in the parameters of ``SMALL``; its directions are drawn once for all estimators."""
    return ClosedForm(sampler, torch.zeros(12, dtype=torch.float64), lambda x: GRADIENT @ x, table_of(SMALL))


def steps_of(estimator: Estimator, objectives: Sequence[ClosedForm], seed: int) -> Iterator[Tensor]:
    """The estimates of a run with such an objective at each step; ``Cone`` looks around those before."""
    memory = MeZO([("unused", nn.Parameter(torch.zeros(1)))], lr=0.0, **UPDATES["trail"])
    for number, objective in enumerate(objectives):
        objective.number = number
        aimed = estimator.knowing(memory) if isinstance(estimator, Cone) else estimator
        estimate = aimed.estimate(objective, seed=derive_seed(seed, number))
        memory.step(estimate=estimate)
        yield objective.dense(estimate)


def mean_estimate(estimator: Estimator, objectives: Sequence[ClosedForm]) -> tuple[Tensor, Tensor]:
    """The mean over steps, each with a seed of its own, and its standard error."""
    estimates = torch.stack(list(steps_of(estimator, objectives, 2)))
    return estimates.mean(0), estimates.std(0) / math.sqrt(len(estimates))


@each_estimator
def test_the_mean_estimate_of_a_linear_objective_is_the_stated_one(name: str):
    """The gradient times a factor, or a vector along it; to within four standard errors."""
    rule = ESTIMATORS[name]
    mean, error = mean_estimate(rule.estimator, [linear(SAMPLERS[sampler_of(name)])] * 300)
    length = float(mean @ GRADIENT / (GRADIENT @ GRADIENT))
    factor = length if rule.factor is None else rule.factor
    assert length == pytest.approx(factor, rel=0.3)
    assert bool(((mean - factor * GRADIENT).abs() < 4 * error).all())
    assert float(mean @ GRADIENT / (mean.norm() * GRADIENT.norm())) > 0.95


@each_sampler
def test_along_any_sampler_the_mean_estimate_is_the_gradient(name: str):
    """Over seeds, steps and the factors that steps share; less where a sampler leaves parameters out at times."""
    sampler = settled(name, table_of(SMALL))
    fixed = isinstance(sampler, LowRank) and sampler.refresh_left is None
    objectives = [linear(replace(sampler, seed=trial) if fixed else sampler) for trial in range(400)]
    mean, error = mean_estimate(ESTIMATORS["mezo"].estimator, objectives)
    shares = [share_of(name, sampler, info.name) for info in table_of(SMALL) for _ in range(info.numel)]
    expected = torch.tensor(shares) * GRADIENT
    assert bool(((mean - expected).abs() < 4 * error).all())
    assert float((mean - expected).norm() / expected.norm()) < 0.5


def share_of(name: str, sampler: Sampler, parameter: str) -> float:
    """The mean estimate of a parameter's gradient is the gradient times this."""
    if isinstance(sampler, ScaledByNorm):
        assert sampler.scales is not None
        assert set(sampler.scales) == {"layers.0", "layers.1", "norm"}
        return sampler.scales[parameter if parameter == "norm" else parameter[:8]] ** 2
    return SHARES.get(name, 1.0) if "layers" in parameter else 1.0


@functools.cache
def quadratic(name: str) -> ClosedForm:
    """A bowl that is as wide again in some directions, and whose lowest value is 0."""
    widths = torch.linspace(0.5, 1.0, 12, dtype=torch.float64)
    sampler = settled(name, table_of(SMALL))
    return ClosedForm(sampler, torch.zeros(12), lambda x: widths @ (x - 1).square() / 2, table_of(SMALL))


@pytest.mark.parametrize("sampler", SAMPLERS)
@each_estimator
def test_every_pair_descends_on_a_quadratic(name: str, sampler: str):
    if frozenset({name, sampler}) in REFUSED.keys() | IMPLIED:
        return
    rule, bowl = ESTIMATORS[name], quadratic(sampler)
    bowl.theta = torch.zeros(12, dtype=torch.float64)
    start = float(bowl.function(bowl.theta))
    for estimate in steps_of(rule.estimator, [bowl] * 40, 1):
        bowl.theta = bowl.theta - rule.lr * estimate
    assert float(bowl.function(bowl.theta)) < 0.8 * start
