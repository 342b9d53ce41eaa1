"""What forward passes alone say about the numbers of a run: epsilon, learning rate, batch size, queries.

Everything is read off values of the objective at points ``theta + sum of c z``, by the same evaluators as in training:
no gradient, no Hessian-vector product. ``measure`` makes all measurements; each is a function of its own as well.

=================  =====================================================================  ============================
measurement        from                                                                   forward passes
=================  =====================================================================  ============================
noise floor        scatter about a polynomial on a line for each epsilon                  73
ladder             two-point slopes of 8 directions at nine values of epsilon             145
curvature          second differences along K directions and sums of neighbours           6 K + 1
batches            the slopes of 16 directions on each of B disjoint batches              32 B
=================  =====================================================================  ============================

All of it holds near the present weights: measure again after some training if in doubt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mezo_lightning.evaluators import Evaluate, Evaluation
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import Point, round_coefficient

EPSILONS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FEWEST_DIRECTIONS = 8
_LINE = 8  # points on a line, for the noise floor, beside the point that all lines share
_DEGREE = 4  # of the polynomial on it
MANY_TIES = 0.5  # of the samples: an epsilon at which more of them tie says little
_SMALL_ERROR = 0.1  # of a slope
_NEIGHBOURS = 4  # with how many others each direction is summed


@dataclass(frozen=True)
class Rung:
    """Two-point slopes at one epsilon, over a few directions."""

    epsilon: float
    slope: float
    """Root mean square over the directions."""
    noise_floor: float
    """Standard deviation of the objective's own error that far away: of rounding, chance, or kinks. An upper end where
    epsilon is large: all that is not smooth over a few epsilon counts."""
    noise: float
    """What that adds to a slope, at most: noise floor / epsilon, as errors on the two sides can be opposite. Those of
    16-bit weights are."""
    change: float
    """Root mean square change of the slopes to the next larger epsilon (the largest: from the next smaller one)."""
    tie_fraction: float
    """Share of the samples with the same value on both sides."""
    curvature: float
    """Root mean square of the second differences, z' H z."""
    curvature_noise: float
    """What the noise floor adds to a second difference: sqrt(6) noise floor / epsilon^2."""
    curvature_change: float
    """As ``change``, of the second differences."""

    @property
    def error(self) -> float:
        """About how wrong a slope is: noise where epsilon is small, higher derivatives where it is large."""
        return math.hypot(self.noise, self.change)

    @property
    def curvature_error(self) -> float:
        """About how wrong a second difference is."""
        return math.hypot(self.curvature_noise, self.curvature_change)

    @property
    def usable(self) -> bool:
        """Whether slopes are wrong by less than half of what they are."""
        return self.error < self.slope / 2


@dataclass(frozen=True)
class Curvature:
    """The Hessian H of the objective on one batch, as random directions see it."""

    epsilon: float
    along: tuple[float, ...]
    """z' H z for each direction."""
    trace: float
    """tr(H), the mean of them."""
    trace_error: float
    """Its standard error."""
    effective_rank: float
    """tr(H)^2 / tr(H^2); NaN where the curvature is lost in noise, or has both signs alike."""
    rank_interval: tuple[float, float]
    """Where it lies in about nine cases of ten."""
    largest_eigenvalue: float
    """No eigenvalue exceeds sqrt(tr(H^2)): of that the upper end, two standard errors above. Noise is left in, so that
    it holds where the effective rank is unknown."""

    @property
    def largest_trace(self) -> float:
        """tr(H) plus two standard errors."""
        return self.trace + 2 * self.trace_error

    @property
    def steepest(self) -> float:
        """Largest tr(H) + 2 largest eigenvalue, which limits the learning rate.

        For Gaussian z, E[(z'g)^2 z'Hz] = |g|^2 tr(H) + 2 g'Hg. So steps -lr (z'g) z change the objective by at most
        (-lr + lr^2 / 2 steepest) |g|^2, on average.
        """
        return self.largest_trace + 2 * self.largest_eigenvalue

    @property
    def largest_stable_lr(self) -> float:
        """At most 2 / steepest, for one direction per step (of more: ``most_by_queries``). NaN without curvature."""
        return 2 / self.steepest if self.trace > 2 * self.trace_error else math.nan

    @property
    def most_by_queries(self) -> float:
        """The mean of q directions allows q m / (m - 1 + q) times the learning rate of one: this m, no more.

        Then tr(H) / q + (1 + 1 / q) largest eigenvalue stands in the place of ``steepest``.
        """
        return self.steepest / self.largest_eigenvalue if self.largest_eigenvalue else math.inf


@dataclass(frozen=True)
class BatchNoise:
    """Slopes of the same directions on disjoint batches."""

    epsilon: float
    slopes: tuple[tuple[float, ...], ...]
    """[batches][directions]"""
    signal: float
    """Squared length of the gradient that all batches share."""
    noise: float
    """Mean squared distance of one batch's gradient from it, as far as a slope shows it."""

    @property
    def ratio(self) -> float:
        """Signal to noise of one batch."""
        return self.signal / self.noise if self.noise else math.inf


@dataclass(frozen=True)
class Tuning:
    """All measurements."""

    noise_floor: float
    """That of the rung to choose."""
    ladder: tuple[Rung, ...]
    """By epsilon, the smallest first."""
    curvature: Curvature
    batches: BatchNoise
    probes: int
    """Forward passes over a batch that all of it took."""

    @property
    def best(self) -> Rung:
        """The rung to choose, see ``best_rung``."""
        return best_rung(self.ladder)

    @property
    def rough(self) -> bool:
        """Whether second differences depend on epsilon where they are clearest: they are no derivatives there."""
        there = min(_telling(self.ladder), key=lambda rung: _share(rung.curvature_error, rung.curvature))
        return not there.curvature_error < there.curvature / 2


def measure(
    batches: Sequence[Evaluate], *, seed: int = 0, num_directions: int = 64, epsilons: Sequence[float] = EPSILONS
) -> Tuning:
    """Measure everything; the weights stay as they are.

    Args:
        batches: One ``evaluate`` for each of several disjoint batches of the size of the run.
        seed: Decides the directions.
        num_directions: Directions for the curvature; its error falls with their square root.
        epsilons: The ladder, ascending.

    Raises:
        ValueError: If there are fewer than two batches, 8 directions or 3 epsilons, or if the objective has no value.
    """
    if len(batches) < 2:
        raise ValueError(f"batches: {len(batches)} given, but at least 2 are needed to tell signal from noise")
    if num_directions < FEWEST_DIRECTIONS:
        raise ValueError(f"num_directions={num_directions} must be at least {FEWEST_DIRECTIONS}")
    if len(epsilons) < 3 or list(epsilons) != sorted(set(epsilons)) or epsilons[0] <= 0:
        raise ValueError(f"epsilons={list(epsilons)} must be at least three positive numbers in ascending order")
    seeds = [derive_seed(seed, purpose) for purpose in range(4)]
    floors = noise_floors(batches[0], seed=seeds[0], epsilons=epsilons)
    ladder = climb(batches[0], floors, seed=seeds[1], epsilons=epsilons)
    clearest = min(_telling(ladder), key=lambda rung: _share(rung.curvature_error, rung.curvature))
    curvature = bend(batches[0], clearest.noise_floor, clearest.epsilon, seed=seeds[2], num_directions=num_directions)
    best = best_rung(ladder)
    slopes = compare(batches, best.epsilon, seed=seeds[3])
    probes = count_probes(len(batches), num_directions, len(epsilons))
    return Tuning(best.noise_floor, ladder, curvature, slopes, probes)


def count_probes(num_batches: int, num_directions: int = 64, num_epsilons: int = len(EPSILONS)) -> int:
    """How many forward passes over a batch ``measure`` takes.

    Args:
        num_batches: How many batches it gets.
        num_directions: For the curvature.
        num_epsilons: On the ladder.
    """
    of_epsilons, curvature = (_LINE + 2 * 8) * num_epsilons + 2, (2 + _NEIGHBOURS) * num_directions + 1
    return of_epsilons + curvature + 2 * 16 * num_batches


def noise_floors(evaluate: Evaluate, *, seed: int, epsilons: Sequence[float] = EPSILONS) -> tuple[float, ...]:
    """The standard deviation of the objective's own error at each epsilon: its scatter about a polynomial on a line.

    What a polynomial of degree 4 leaves of nine values is noise where the function is smooth. (Moré and Wild,
    "Estimating computational noise", 2011, take differences of high order for it.) The points are epsilon / 3 apart:
    much closer ones would round to the same 16-bit weights. Where most weights are too coarse to move by epsilon at
    all, the error is larger than this: it grows along with the distance, as ``Rung.change`` shows.

    Args:
        evaluate: The objective on one batch.
        seed: Decides the lines, one for each epsilon.
        epsilons: Ascending.
    """
    # Of 8 bits: rounding the points' coefficients to 12 bits leaves them equally far apart.
    spacings = [math.ldexp(round(256 * part), power - 8) for part, power in (math.frexp(e / 3) for e in epsilons)]
    steps = range(1, _LINE + 1)
    lines = [[Point(((derive_seed(seed, line), i * h),)) for i in steps] for line, h in enumerate(spacings)]
    here, *there = _checked(evaluate([Point(), *(point for line in lines for point in line)])).means
    values = np.array([[here, *there[at : at + _LINE]] for at in range(0, len(there), _LINE)]) - here
    basis = np.linalg.qr(np.vander(np.arange(_LINE + 1) - _LINE / 2, _DEGREE + 1))[0]
    rests = values - values @ basis @ basis.T
    found = np.sqrt(np.square(rests).sum(1) / (_LINE - _DEGREE)).tolist()
    # The floor rises with epsilon or stays: the median of neighbours keeps what rises, and evens out chance.
    around = [found[0], *found, found[-1]]
    return tuple(float(np.median(around[at : at + 3])) for at in range(len(found)))


def climb(
    evaluate: Evaluate,
    floors: Sequence[float],
    *,
    seed: int,
    epsilons: Sequence[float] = EPSILONS,
    num_directions: int = 8,
) -> tuple[Rung, ...]:
    """Slopes and second differences of the same directions at every epsilon: where are they signal?

    Args:
        evaluate: The objective on one batch.
        floors: Its noise floor at each epsilon.
        seed: Decides the directions.
        epsilons: Ascending.
        num_directions: How many directions.
    """
    seeds = [derive_seed(seed, direction) for direction in range(num_directions)]
    rounded = np.array([round_coefficient(epsilon) for epsilon in epsilons])
    points = [Point()] + [Point(((s, way * epsilon),)) for epsilon in rounded for s in seeds for way in (1, -1)]
    evaluation = _checked(evaluate(points))
    here, *there = evaluation.means
    sides = np.array(there).reshape(len(rounded), num_directions, 2)
    slopes = (sides[..., 0] - sides[..., 1]) / (2 * rounded[:, None])
    bends = (sides.sum(-1) - 2 * here) / rounded[:, None] ** 2
    size = sides[0].size
    pairs = [[(i, i + 1) for i in range(1 + at, 1 + at + size, 2)] for at in range(0, len(there), size)]
    columns = zip(
        map(float, rounded),
        _rms(slopes).tolist(),
        map(float, floors),
        (np.array(floors) / rounded).tolist(),
        _changes(slopes),
        map(evaluation.tie_fraction, pairs),
        _rms(bends).tolist(),
        (math.sqrt(6) * np.array(floors) / rounded**2).tolist(),
        _changes(bends),
        strict=True,
    )
    return tuple(Rung(*column) for column in columns)


def best_rung(ladder: Sequence[Rung]) -> Rung:
    """The largest epsilon with slopes that are wrong by at most a tenth, or else the least wrong one.

    Epsilons at which most samples tie do not count: there, a slope of 0 looks right and says nothing.

    Args:
        ladder: Of ``climb``.
    """
    telling = _telling(ladder)
    good = [rung for rung in telling if _share(rung.error, rung.slope) <= _SMALL_ERROR]
    return good[-1] if good else min(telling, key=lambda rung: _share(rung.error, rung.slope))


def bend(evaluate: Evaluate, floor: float, epsilon: float, *, seed: int, num_directions: int = 64) -> Curvature:
    """Trace and effective rank of the Hessian: what sets the learning rate, and why descent works in many dimensions.

    ``q_i = (f(+z_i) + f(-z_i) - 2 f(0)) / epsilon^2`` has mean tr(H), and for two directions
    ``a_ij = (f(z_i + z_j) - f(z_i) - f(z_j) + f(0)) / epsilon^2`` is z_i' H z_j, whose square has mean tr(H^2), for any
    directions with independent coordinates; the variance of q, the usual way to tr(H^2), needs Gaussian ones and
    scatters more. What the noise floor adds to the squares is taken off. (The local effective rank of Malladi et al.,
    2023, tr(H) / lambda_max, needs products with the Hessian; where H has no negative eigenvalue, it is at most this.)

    Args:
        evaluate: The objective on one batch.
        floor: Its noise floor at that epsilon.
        epsilon: How far apart the points are.
        seed: Decides the directions.
        num_directions: How many directions.
    """
    step, count = round_coefficient(epsilon), num_directions
    seeds = [derive_seed(seed, direction) for direction in range(count)]
    mates = np.array([(i, (i + shift) % count) for shift in range(1, _NEIGHBOURS + 1) for i in range(count)])
    sides = [Point(((s, way * step),)) for way in (1, -1) for s in seeds]
    sums = [Point(((seeds[i], step), (seeds[j], step))) for i, j in mates.tolist()]
    values = np.array(_checked(evaluate([Point(), *sides, *sums])).means)
    values = (values - values[0]) / step**2
    ahead, back, both = values[1 : count + 1], values[count + 1 : 2 * count + 1], values[2 * count + 1 :]
    along = ahead + back
    products = both - ahead[mates].sum(1)
    noise = (floor / step**2) ** 2
    trace, error = float(along.mean()), math.sqrt(along.var(ddof=1) / count + 4 * noise)
    clear = trace > 2 * error and np.square(products).mean() > 8 * noise
    rank, interval = _rank(along, products, mates, noise) if clear else (math.nan, (math.nan, math.nan))
    largest = _largest_eigenvalue(products, mates, count)
    return Curvature(step, tuple(along.tolist()), trace, error, rank, interval, largest)


def compare(batches: Sequence[Evaluate], epsilon: float, *, seed: int, num_directions: int = 16) -> BatchNoise:
    """The same directions on disjoint batches: how much of a slope is the batch's own.

    With slopes s_kb of direction k on batch b, the noise is the variance over the batches, and the signal is the mean
    square of their means less the part of the noise that is left in it.

    Args:
        batches: One ``evaluate`` for each batch.
        epsilon: How far the objective is probed.
        seed: Decides the directions.
        num_directions: How many directions.
    """
    step = round_coefficient(epsilon)
    points = [Point(((derive_seed(seed, k), way * step),)) for k in range(num_directions) for way in (1, -1)]
    sides = np.array([_checked(evaluate(points)).means for evaluate in batches]).reshape(len(batches), -1, 2)
    slopes = (sides[..., 0] - sides[..., 1]) / (2 * step)
    noise = float(slopes.var(0, ddof=1).mean())
    signal = max(0.0, float(np.square(slopes.mean(0)).mean()) - noise / len(batches))
    return BatchNoise(step, tuple(map(tuple, slopes.tolist())), signal, noise)


def _telling(ladder: Sequence[Rung]) -> list[Rung]:
    """The rungs where not most samples tie, or else the one with the fewest ties."""
    fewest = min(rung.tie_fraction for rung in ladder)
    return [rung for rung in ladder if rung.tie_fraction <= max(MANY_TIES, fewest)]


def _checked(evaluation: Evaluation) -> Evaluation:
    if evaluation.skip_reason:
        raise ValueError(f"the objective cannot be measured: {evaluation.skip_reason}")
    return evaluation


def _rank(
    along: np.ndarray, products: np.ndarray, mates: np.ndarray, noise: float
) -> tuple[float, tuple[float, float]]:
    """tr(H)^2 / tr(H^2) and its 90 % interval, by the jackknife over directions."""
    squares = np.square(products)

    def estimate(kept: np.ndarray) -> float:
        square = max(float(squares[kept[mates].all(1)].mean()) - 4 * noise, 1e-12 * float(squares.mean()))
        # The square of a mean is too large by the mean's variance.
        return max(1e-12, (along[kept].mean() ** 2 - 2 * square / kept.sum() - 4 * noise) / square)

    count = len(along)
    rank = estimate(np.ones(count, dtype=bool))
    if rank < 0.5:  # a valley's is 1 or more: this is a saddle, or so rough that there are no second derivatives
        return math.nan, (math.nan, math.nan)
    others = np.log([estimate(kept) for kept in ~np.eye(count, dtype=bool)])
    spread = math.sqrt((count - 1) / count * np.square(others - others.mean()).sum())
    return max(1.0, rank), (max(1.0, rank * math.exp(-1.645 * spread)), rank * math.exp(1.645 * spread))


def _largest_eigenvalue(products: np.ndarray, mates: np.ndarray, count: int) -> float:
    """sqrt(tr(H^2)), of the mean square of the products plus two standard errors by the jackknife over directions."""
    squares = np.square(products)
    others = np.array([squares[kept[mates].all(1)].mean() for kept in ~np.eye(count, dtype=bool)])
    spread = math.sqrt((count - 1) / count * np.square(others - others.mean()).sum())
    return math.sqrt(squares.mean() + 2 * spread)


def _rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.square(values).mean(-1))


def _changes(values: np.ndarray) -> list[float]:
    """The change of each row to the next, and of the last from the one before."""
    changes = _rms(np.diff(values, axis=0)).tolist()
    return [*changes, changes[-1]]


def _share(error: float, size: float) -> float:
    return error / size if size else math.inf
