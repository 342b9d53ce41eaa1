"""Objectives whose derivatives are known in closed form, evaluated at points without any model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mezo_lightning.evaluators import Evaluation, Samples
from mezo_lightning.parameters import ParameterInfo
from mezo_lightning.rowwise.points import RowPoint, row_seed
from mezo_lightning.samplers import Sampler
from mezo_lightning.steps import GradientEstimate, Point


def table_of(shapes: dict[str, tuple[int, ...]]) -> list[ParameterInfo]:
    """The table of parameters of these names and shapes, one after another."""
    table, start = [], 0
    for name, shape in shapes.items():
        table.append(ParameterInfo(name, shape, start, 0))
        start += table[-1].numel
    return table


class ClosedForm:
    """A function of theta + sum of c z, in fp64 throughout: exact up to rounding errors of fp64.

    Theta is one vector, or the parameters of ``table``. A point with a direction for each row has ``rows`` of them.
    """

    rows = 6

    def __init__(
        self,
        sampler: Sampler,
        theta: Tensor,
        function: Callable[[Tensor], Tensor],
        table: Sequence[ParameterInfo] | None = None,
    ):
        self.theta = theta
        self.function = function
        self.number = 0  # of the step
        self.rounds: list[Sequence[Point]] = []
        self._directions = sampler.bind(table or [ParameterInfo("x", tuple(theta.shape), 0, 0)])
        self._known: dict[tuple[int, int], Tensor] = {}

    def direction(self, seed: int) -> Tensor:
        key = seed, self.number
        if key not in self._known:
            self._known[key] = self._directions.fill(torch.empty(self.theta.numel()), seed, 0, self.number).double()
        return self._known[key]

    def dense(self, estimate: GradientEstimate) -> Tensor:
        """The gradient estimate as the vector that it stands for."""
        return sum(
            (estimate.scale * g * self.direction(seed) for seed, g in estimate.terms), torch.zeros_like(self.theta)
        )

    def __call__(self, points: Sequence[Point]) -> Evaluation:
        self.rounds.append(points)
        samples = []
        for point in points:
            if isinstance(point, RowPoint):
                of_rows = [((row_seed(point.seed, row), point.coefficient),) for row in range(self.rows)]
            else:
                of_rows = [point.terms]
            places = [self.theta + sum((c * self.direction(seed) for seed, c in terms), 0) for terms in of_rows]
            samples.append(Samples.of(torch.stack([self.function(place) for place in places])))
        return Evaluation.of(points, samples, 0.5)


class Quadratic(ClosedForm):
    """1/2 x^T A x + b^T x, convex."""

    def __init__(self, sampler: Sampler, count: int = 40):
        generator = torch.Generator().manual_seed(0)
        root = torch.randn(count, count, generator=generator, dtype=torch.float64)
        self.a = root @ root.T / count
        self.b = torch.randn(count, generator=generator, dtype=torch.float64)
        theta = torch.randn(count, generator=generator, dtype=torch.float64)
        super().__init__(sampler, theta, lambda x: x @ self.a @ x / 2 + self.b @ x)

    def gradient(self) -> Tensor:
        return self.a @ self.theta + self.b
