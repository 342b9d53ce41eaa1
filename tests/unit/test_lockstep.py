"""Two probes by turns: the same values as one after the other, whatever the objective does, and half the directions."""

import os
import signal
from collections.abc import Callable

import pytest
import torch
from test_evaluators import tiny_opt
from torch import Tensor, nn

from mezo_lightning import leaf_scratch
from mezo_lightning.evaluators import Evaluation
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.lockstep import Lockstep
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rowwise.points import rows_that_run, running
from mezo_lightning.samplers import Gaussian
from mezo_lightning.steps import Point

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])
POINTS = [
    Point(), Point(((1, 1e-1),)), Point(((1, -1e-1),)), Point(((2, 1e-1),)), Point(((3, 1e-1),)), Point(((3, -2e-1),)),
    Point(((4, 1e-2), (5, 1e-2))), Point(((4, -1e-2), (5, -1e-2))),
]  # fmt: skip


class Routed(nn.Module):
    """One of two layers, as the values decide."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.one, self.other, self.head = (
            nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10)
        )  # fmt: skip
        self.threshold = 0.0
        self.routes: list[bool] = []

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        first = bool(x.sum() > self.threshold)
        self.routes.append(first)
        y = self.one(x) if first else self.other(x)
        return self.head(torch.tanh(self.one(y) + self.other(y)))


class Counting(Gaussian):
    """Counts the numbers that are made."""

    made = 0

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        type(self).made += out.numel()
        return super().fill(out, seed, start, number)


def small_opt(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return tiny_opt().to(dtype).eval()


def evaluate(
    model: nn.Module,
    objective: Callable[[], Tensor],
    *,
    lockstep: bool,
    points: list[Point] = POINTS,
) -> Evaluation:
    """The second evaluation: the first one watches for weights that are used outside of their modules."""
    evaluator = LeafScratch(model, MeZO(model.named_parameters(), sampler=Counting()).space, lockstep=lockstep)
    evaluator(objective)(POINTS[:2])
    Counting.made = 0
    return evaluator(objective)(points)


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: model(IDS).float().logsumexp(-1).sum(-1)


@pytest.mark.parametrize("blocks", [1 << 19, 40])
@pytest.mark.parametrize("spared", [0, 8, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_values_are_those_of_one_probe_after_the_other(
    dtype: torch.dtype, spared: int, blocks: int, monkeypatch: pytest.MonkeyPatch
):
    """All layers together; the runs part at the head, which has the largest output; and at the first layer."""
    monkeypatch.setattr(leaf_scratch, "_SPARED", spared)
    monkeypatch.setattr(leaf_scratch, "chunk_numel", lambda device: blocks)
    model = small_opt(dtype)
    before = [p.clone() for p in model.parameters()]
    alone = evaluate(model, loss_of(model), lockstep=False)
    made = Counting.made
    both = evaluate(model, loss_of(model), lockstep=True)
    assert torch.equal(both.values, alone.values)
    assert len(set(map(tuple, both.values.tolist()))) == len(POINTS)
    assert all(map(torch.equal, model.parameters(), before))
    assert Counting.made < made if spared < 1 << 20 else Counting.made == made


def test_a_direction_is_made_once_for_a_pair(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(leaf_scratch, "_SPARED", 0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2, bias=False))
    x = torch.randn(20, 3)
    evaluate(model, lambda: model(x).sum(-1), lockstep=True, points=POINTS[1:3])
    assert Counting.made == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_runs_that_take_other_layers_part(micro_batches: int):
    torch.manual_seed(0)
    model = Routed()

    def objective() -> Tensor:
        return torch.cat([model(part).sum((1, 2)) for part in IDS.chunk(micro_batches)])

    with torch.no_grad():
        model.threshold = float(model.embed(IDS).sum())
    alone, both = (evaluate(model, objective, lockstep=lockstep) for lockstep in (False, True))
    assert torch.equal(alone.values, both.values)
    assert set(model.routes[-len(POINTS) :]) == {True, False}


@pytest.mark.parametrize("failing", [[0], [1], [0, 1]])
@pytest.mark.parametrize("place", ["before", "after"])
def test_an_error_is_raised_as_if_one_probe_came_after_the_other(failing: list[int], place: str):
    model = small_opt()
    before = [p.clone() for p in model.parameters()]
    runs = 0
    evaluator = LeafScratch(model, MeZO(model.named_parameters()).space, lockstep=True)
    evaluator(loss_of(model))(POINTS[1:3])

    def objective() -> Tensor:
        nonlocal runs
        run = runs
        runs += 1
        values = loss_of(model)() if place == "after" else None
        if run in failing:
            raise KeyError(f"run {run}")
        return loss_of(model)() if values is None else values

    with pytest.raises(KeyError, match=f"run {failing[0]}"):
        evaluator(objective)(POINTS[1:3])
    assert all(map(torch.equal, model.parameters(), before))
    assert not any("forward" in vars(module) for module in model.modules())
    assert evaluator(loss_of(model))(POINTS).skip_reason is None


@pytest.mark.parametrize("interrupted", [0, 1])
def test_ctrl_c_ends_both_runs(interrupted: int):
    model = small_opt()
    before = [p.clone() for p in model.parameters()]
    evaluator = LeafScratch(model, MeZO(model.named_parameters()).space, lockstep=True)
    evaluator(loss_of(model))(POINTS[1:3])
    runs = 0

    def objective() -> Tensor:
        nonlocal runs
        run = runs
        runs += 1
        if run == interrupted:
            os.kill(os.getpid(), signal.SIGINT)
        return loss_of(model)()

    with pytest.raises(KeyboardInterrupt):
        evaluator(objective)(POINTS[1:3])
    assert all(map(torch.equal, model.parameters(), before))
    assert not any("forward" in vars(module) for module in model.modules())


def test_both_runs_have_the_callers_settings():
    seen: list[tuple[object, ...]] = []
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(4, 3)

    def objective() -> Tensor:
        values = model(x)
        kinds = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        seen.append((values.dtype, rows_that_run(), *kinds))
        return values.sum(-1)

    with running([3, 1, 4, 1]), torch.autocast("cpu", torch.bfloat16):
        alone, both = (evaluate(model, objective, lockstep=lockstep) for lockstep in (False, True))
    assert set(seen) == {(torch.bfloat16, (3, 1, 4, 1), True, True, torch.bfloat16)}
    assert torch.equal(alone.values, both.values)


def test_settings_that_a_run_changes_stay_its_own(monkeypatch: pytest.MonkeyPatch):
    """Autocast that one run switches on must neither be on in the other one, nor afterwards."""
    monkeypatch.setattr(leaf_scratch, "_SPARED", 0)
    seen: list[tuple[torch.dtype, torch.dtype, torch.dtype]] = []
    first, second, third = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
    model = nn.ModuleList([first, second, third])
    x = torch.randn(4, 3)

    def objective() -> Tensor:
        one = first(x)
        with torch.autocast("cpu", torch.bfloat16):
            two = second(one)
        three = third(two.float())
        seen.append((one.dtype, two.dtype, three.dtype))
        return three.sum(-1)

    alone, both = (evaluate(model, objective, lockstep=lockstep) for lockstep in (False, True))
    assert set(seen) == {(torch.float32, torch.bfloat16, torch.float32)}
    assert torch.equal(alone.values, both.values)
    assert not torch.is_autocast_enabled("cpu")


def test_requests_are_served_together_until_they_differ():
    """The follower has its last answer before the runs part, and what is asked later is served to each alone."""
    served: list[dict[int, str]] = []
    turns: list[int] = []

    def serve(requests: dict[int, str]) -> list[str]:
        assert set(requests) <= {0, 1}
        served.append(requests)
        return [f"{turns[-1] if len(requests) == 1 else run}:{word}" for run, word in requests.items()]

    def function() -> list[str]:
        run = turns[-1]
        return [lockstep.ask(word) for word in ["a", "b", "cd"[run], "e"]]

    lockstep = Lockstep(function, serve, lambda one, other: one == other, turns.append)
    assert lockstep() == (["0:a", "0:b", "0:c", "0:e"], ["1:a", "1:b", "1:d", "1:e"])
    assert served == [{0: "a", 1: "a"}, {0: "b", 1: "b"}, {0: "c"}, {0: "e"}, {1: "d"}, {1: "e"}]


def test_a_run_that_asks_for_nothing_waits_for_nobody():
    order: list[int] = []

    def function() -> int:
        order.append(turns[-1])
        return turns[-1] if turns[-1] else lockstep.ask(5)

    turns: list[int] = []
    lockstep = Lockstep(function, lambda r: [sum(r.values())], lambda a, b: True, turns.append)
    assert lockstep() == (5, 1)
    assert order == [0, 1]
