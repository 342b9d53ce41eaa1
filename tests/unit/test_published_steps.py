"""Methods with structured directions against their published algorithms: estimator, sampler and optimizer together.

Each algorithm is plain torch on tensors. It holds its factors in memory, draws them when the paper says so, and knows
two forward passes (or a population's) at weights that it has moved itself. Only random numbers are ours, by the key
that says what they are for. ``test_sparse.py`` has Sparse-MeZO, and ``test_estimators_field.py`` dense directions.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezo_lightning.estimators import CentralDifference, Estimator, Population
from mezo_lightning.evaluators import Copy, Evaluator
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian, Sampler, derive_seed
from mezo_lightning.structured import LowRank, Subset

LR, EPSILON = 0.125, 2.0**-5
STEPS = 7
U, C, V, BLOCKS = range(4)  # what random numbers are for
Weights = dict[str, Tensor]
Loss = Callable[[Weights], float]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 8), nn.Linear(6, 9)
        self.layers = nn.ModuleList([nn.Linear(8, 7), nn.Linear(7, 7), nn.Linear(7, 6)])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def cross_entropy(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.double(), (torch.arange(9) * 4 + 1) % 9, reduction="none")


# -- the published algorithms ------------------------------------------------------------------------------------------


class Published(ABC):
    """Weights, each with the position that our random numbers go by, and a step of the algorithm."""

    def __init__(self, theta: Weights, loss: Loss):
        self.theta, self.loss = theta, loss
        self.starts, start = {}, 0
        for name, weights in theta.items():
            self.starts[name] = start
            start += weights.numel()

    @abstractmethod
    def step(self, number: int, seed: int) -> None:
        """Step ``number``, from 0 on, with new random numbers by ``seed``."""

    def at(self, z: Weights, coefficient: float) -> Weights:
        return {name: weights + coefficient * z[name] for name, weights in self.theta.items()}

    def two_points(self, z: Weights) -> None:
        """g = (L(theta + epsilon z) - L(theta - epsilon z)) / (2 epsilon), and theta <- theta - lr g z."""
        g = (self.loss(self.at(z, EPSILON)) - self.loss(self.at(z, -EPSILON))) / (2 * EPSILON)
        self.theta = self.at(z, -LR * g)

    def dense(self, name: str, seed: int) -> Tensor:
        """A Gaussian direction of a parameter."""
        out = torch.empty(self.theta[name].numel())
        return Gaussian().fill(out, seed, self.starts[name]).view(self.theta[name].shape)

    def low_rank(self, seed: int, product: Callable[[str], Tensor]) -> Weights:
        """A product of factors for every matrix, and a dense direction for every vector."""
        return {name: product(name) if w.dim() == 2 else self.dense(name, seed) for name, w in self.theta.items()}

    def factors(self, which: int, rank: int, *key: int) -> Weights:
        """A Gaussian U, C or V for every matrix: [rows, rank], [rank, rank] or [columns, rank]."""
        seed, *period = key
        matrices = {name: weights.shape for name, weights in self.theta.items() if weights.dim() == 2}
        lengths = {name: {U: rows, C: rank, V: columns}[which] for name, (rows, columns) in matrices.items()}
        return {
            name: on_grid(
                Gaussian().fill(torch.empty(length * rank), derive_seed(seed, which, *period, self.starts[name]), 0)
            ).view(length, rank)
            for name, length in lengths.items()
        }


def on_grid(factor: Tensor) -> Tensor:
    return (factor * 64).round() / 64


class Lozo(Published):
    """Z = U V^T: U is new at every step, V every 3 (Chen et al., 2024). Ours is divided by the root of the rank."""

    sampler = LowRank(2, refresh_left=0, refresh_right=3, seed=5)
    period = -1

    def step(self, number: int, seed: int) -> None:
        if number % 3 == 0:
            self.period += 1
            self.v = self.factors(V, 2, 5, self.period)
        u = self.factors(U, 2, seed)
        self.two_points(self.low_rank(seed, lambda name: u[name] @ self.v[name].T / math.sqrt(2)))


class SubZero(Published):
    """Z = U C V^T: U and V stay for 3 steps, and the small C is new at every step (Yu et al., 2024).

    As its code does, Z is divided by what its entries would have as their standard deviation. But U and V are Gaussian,
    and not made orthonormal by a QR decomposition: that divisor is the rank, not rank / sqrt(rows * columns).
    """

    sampler = LowRank(3, core="dense", refresh_left=3, refresh_right=3, seed=6)
    period = -1

    def step(self, number: int, seed: int) -> None:
        if number % 3 == 0:
            self.period += 1
            self.u, self.v = self.factors(U, 3, 6, self.period), self.factors(V, 3, 6, self.period)
        c = self.factors(C, 3, seed)
        self.two_points(self.low_rank(seed, lambda name: self.u[name] @ c[name] @ self.v[name].T / 3))


class Tezo(Published):
    """Z = U diag(tau) V^T: U and V are drawn once, tau at every step. Ours is divided by the root of the rank."""

    sampler = LowRank(4, core="diagonal", refresh_left=None, refresh_right=None, seed=7)

    def step(self, number: int, seed: int) -> None:
        if number == 0:
            self.u, self.v = self.factors(U, 4, 7, 0), self.factors(V, 4, 7, 0)
        c = self.factors(C, 4, seed)
        tau = {name: core.diagonal() for name, core in c.items()}
        self.two_points(self.low_rank(seed, lambda name: (self.u[name] * tau[name]) @ self.v[name].T / 2))


class Eggroll(Published):
    """Members theta +- sigma A B^T / sqrt(rank) in pairs, and the mean of A B^T by z-score (Sarkar et al., 2025).

    Its code multiplies that by sigma and by the root of the number of members; ours has both in the learning rate.
    """

    sampler = LowRank(2, refresh_left=0, refresh_right=0, seed=8)
    estimator = Population(EPSILON, 6, antithetic=True)

    def step(self, number: int, seed: int) -> None:
        del number
        members = []
        for pair in range(3):
            own = derive_seed(seed, pair)
            a, b = self.factors(U, 2, own), self.factors(V, 2, own)
            z = self.low_rank(own, lambda name, a=a, b=b: a[name] @ b[name].T / math.sqrt(2))
            members += [z, {name: -direction for name, direction in z.items()}]
        rewards = torch.tensor([-self.loss(self.at(z, EPSILON)) for z in members], dtype=torch.float64)
        scores = ((rewards - rewards.mean()) / rewards.var(correction=0).sqrt()).tolist()
        mean = {n: sum(score * z[n] for score, z in zip(scores, members, strict=True)) / 6 for n in self.theta}
        self.theta = self.at(mean, LR)


class Lezo(Published):
    """Two of three layers, drawn by lot at every step, are perturbed and updated (Wang et al., 2024).

    Parameters that belong to no layer always are: the paper does not say what becomes of embedding and head.
    """

    sampler = Subset(fraction=0.5, seed=9)  # of three: rounded up

    def active(self, number: int) -> set[int]:
        lots = [derive_seed(9, BLOCKS, number, layer) for layer in range(3)]
        return {layer for layer in range(3) if lots[layer] != max(lots)}

    def step(self, number: int, seed: int) -> None:
        left_out = tuple(f"layers.{layer}." for layer in {0, 1, 2} - self.active(number))
        z = {name: self.dense(name, seed) for name in self.theta}
        self.two_points({name: torch.zeros_like(w) if name.startswith(left_out) else w for name, w in z.items()})


class Bcd(Lezo):
    """One layer after another (MeZO-BCD, 2025)."""

    sampler = Subset(order="cyclic")

    def active(self, number: int) -> set[int]:
        return {number % 3}


# -- and ours ----------------------------------------------------------------------------------------------------------

METHODS: list[type[Published]] = [Lozo, SubZero, Tezo, Eggroll, Lezo, Bcd]
EVALUATORS = {"copy": lambda _, space: Copy(space), "leaf scratch": LeafScratch}


@pytest.mark.parametrize("kind", EVALUATORS)
@pytest.mark.parametrize("method", METHODS)
def test_steps_are_those_of_the_published_algorithm(method: type[Published], kind: str):
    """Over all periods, and without correcting one by the other: up to the 12 bits of coefficients and fp32 losses.

    These errors add up: they are held against the way that each parameter has come so far.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, other = Net(), Net()
    other.load_state_dict(model.state_dict())
    ids = torch.arange(9)

    def loss(weights: Weights) -> float:
        with torch.no_grad():
            return float(cross_entropy(torch.func.functional_call(other, weights, (ids,))).mean())

    sampler: Sampler = method.sampler  # pyright: ignore[reportAttributeAccessIssue]
    estimator: Estimator = getattr(method, "estimator", CentralDifference(EPSILON))
    optimizer = MeZO(model.named_parameters(), LR, sampler=sampler)
    evaluator: Evaluator = EVALUATORS[kind](model, optimizer.space)
    published = method({name: weights.detach().clone() for name, weights in model.named_parameters()}, loss)
    way = dict.fromkeys(published.theta, 0.0)
    for number in range(STEPS):
        before, seed = published.theta, derive_seed(4, number)
        # A population's members have seeds that are derived from the step's; with two points there is one direction.
        published.step(number, seed if isinstance(estimator, Population) else derive_seed(seed, 0))
        optimizer.step(estimate=estimator.estimate(evaluator(lambda: cross_entropy(model(ids))), seed=seed))
        for name, weights in model.named_parameters():
            way[name] += float((published.theta[name] - before[name]).norm())
            error = float((weights.detach() - published.theta[name]).norm())
            assert error <= 1e-3 * way[name], (number, name)
    assert loss(published.theta) < loss(dict(other.named_parameters()))
