"""Rules that remember earlier estimates, and decay towards the start: against the formulas with dense tensors."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.dense import DenseAdam, DenseMomentum
from mezo_lightning.estimators import CentralDifference, GuidingVector
from mezo_lightning.evaluators import Copy
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterInfo, ParameterSpace, Slice
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler, derive_seed
from mezo_lightning.steps import GradientEstimate, Step
from mezo_lightning.structured import LowRank, Subset
from mezo_lightning.trajectory import Header, Trajectory, replay
from mezo_lightning.updates import Momentum, ScalarAdam, Trail, Update

LR = 1e-3
UPDATES: list[Update | None] = [None, Momentum(0.8, 3), ScalarAdam(), ScalarAdam(0.5, 0.9, window=4)]
ANCHORED: dict[str, Any] = {"weight_decay": 50.0, "decay_towards": "start"}
DENSE: dict[str, Any] = {"weight_decay": 50.0, "update": DenseAdam(0.5, 0.9), "sampler": LowRank(refresh_right=2)}
# pyright: reportArgumentType=false


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 5))
    for name in ("1.bias", "2.weight"):  # only the second decays
        model.get_parameter(name).data.view(-1)[:3] = -0.0
    return model.to(dtype)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def same_bytes(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(flat(a).view(torch.uint8), flat(b).view(torch.uint8))


def estimates(count: int, queries: int = 1) -> Iterator[GradientEstimate]:
    """As a run makes them: the fourth is a skipped step, the sixth a tie."""
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        grads = torch.randn(queries, generator=generator).mul(10).tolist()
        seeds = tuple(derive_seed(0, step, query) for query in range(queries))
        if step == 3:
            yield GradientEstimate(skipped="all samples failed")
        else:
            yield GradientEstimate(seeds, (0.0,) * queries if step == 5 else tuple(grads), 1 / queries)


def dense(estimate: GradientEstimate, count: int, sampler: Sampler | None = None) -> Tensor:
    """The gradient that an estimate stands for, fp64."""
    directions = (sampler or Gaussian()).bind([ParameterInfo("all", (count,), 0, 0)])
    result = torch.zeros(count, dtype=torch.float64)
    for seed, g in zip(estimate.seeds, estimate.projected_grads, strict=True):
        result += estimate.scale * g * directions.fill(torch.empty(count), seed, 0).double()
    return result


def run(model: nn.Module, given: Sequence[GradientEstimate], rates: Sequence[float] | None = None, **options: Any):
    optimizer = MeZO(model.named_parameters(), lr=LR, **options)
    for step, estimate in enumerate(given):
        if rates is not None:
            for group in optimizer.param_groups:
                group["lr"] = rates[step]
        optimizer.step(estimate=estimate)
    return optimizer


def assert_moved_as(model: nn.Module, start: Tensor, target: Tensor) -> None:
    """To the 12 bits of coefficients and fp32's rounding of each sum."""
    moved, wanted = flat(model).double() - start, target - start
    assert float((moved - wanted).norm() / wanted.norm()) < 4e-4


# -- against the formulas ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", [Momentum(0.8, window=20), DenseMomentum(0.8)], ids=["window", "dense"])
@pytest.mark.parametrize("queries", [1, 3])
def test_momentum_is_torch_sgd_while_the_window_holds_all_steps(queries: int, update: Update):
    """The learning rate is outside of the sum: a schedule acts on old and new estimates alike."""
    model, given = make_model(), list(estimates(12, queries))
    rates = [LR * (1 + math.cos(step / 4)) for step in range(12)]
    start = flat(model).double()
    theta = nn.Parameter(start.clone())
    sgd = torch.optim.SGD([theta], momentum=0.8)
    run(model, given, rates, update=update)
    for estimate, rate in zip(given, rates, strict=True):
        if estimate.seeds:  # a skipped step is no step of momentum
            sgd.param_groups[0]["lr"] = rate
            theta.grad = dense(estimate, start.numel())
            sgd.step()
    assert_moved_as(model, start, theta.detach())


def test_a_window_cuts_the_tail_off():
    model, given = make_model(), list(estimates(12))
    start = flat(model).double()
    run(model, given, update=Momentum(0.8, window=3))
    target, taken = start.clone(), [estimate for estimate in given if estimate.seeds]
    for step in range(len(taken)):
        for k in range(min(3, step + 1)):
            target -= LR * 0.8**k * dense(taken[step - k], start.numel())
    assert_moved_as(model, start, target)


def test_the_docstrings_figure_of_what_the_window_leaves():
    whole = sum(0.9**k for k in range(1000))
    assert sum(0.9**k for k in range(Momentum().window)) / whole == pytest.approx(0.88, abs=0.005)


@pytest.mark.parametrize("zeta", [1e-12, 1.0])
def test_dense_adam_is_torch_adam_but_for_where_zeta_is_added(zeta: float):
    """With a schedule, and two parameter groups of which one decays; after a skipped step it goes on as if there was
    none. At a zeta that matters it is the form of the paper's section 2, written out."""
    model, given = make_model(), list(estimates(12, 2))
    rates = [LR * (1 + math.cos(step / 4)) for step in range(12)]
    start = flat(model).double()
    decayed = torch.cat([torch.full((p.numel(),), float(p.dim() >= 2)) for p in model.parameters()]).double()
    theta = nn.Parameter(start.clone())
    adam = torch.optim.Adam([theta], betas=(0.7, 0.9), eps=zeta)
    target, m, v, t = start.clone(), torch.zeros_like(start), torch.zeros_like(start), 0
    run(model, given, rates, update=DenseAdam(0.7, 0.9, zeta), weight_decay=5.0)
    for estimate, rate in zip(given, rates, strict=True):
        if not estimate.seeds:
            continue
        t += 1
        gradient = dense(estimate, start.numel())
        m, v = 0.7 * m + 0.3 * gradient, 0.9 * v + 0.1 * gradient.square()
        target -= rate * (5.0 * decayed * target + math.sqrt(1 - 0.9**t) / (1 - 0.7**t) * m / (v.sqrt() + zeta))
        adam.param_groups[0]["lr"], theta.grad = rate, gradient
        theta.data -= rate * 5.0 * decayed * theta.data
        adam.step()
    assert_moved_as(model, start, target)
    if zeta < 1e-6:
        assert_moved_as(model, start, theta.detach())


@pytest.mark.parametrize(("update", "stated"), [(DenseMomentum(), 4), (DenseAdam(), 8)])
def test_dense_moments_take_the_memory_that_is_stated(update: Update, stated: int):
    optimizer = run(make_model(torch.bfloat16), list(estimates(2)), update=update)
    beside = optimizer.state_dict()["beside"].values()
    assert sum(state.numel() * state.element_size() for state in beside) == stated * optimizer.space.numel
    assert f"at {stated} bytes beside every weight" in (type(update).__doc__ or "")


@pytest.mark.parametrize("beta1", [0.0, 0.7])
def test_scalar_adam_is_adam_with_one_second_moment(beta1: float):
    """With one direction the second moment is MEAZO's, of the projected gradients."""
    model, given = make_model(), list(estimates(12))
    start = flat(model).double()
    target, m = start.clone(), torch.zeros_like(start)
    v, t = 0.0, 0
    run(model, given, update=ScalarAdam(beta1, 0.9, 1e-3, window=20))
    for estimate in given:
        if not estimate.seeds:
            continue
        t += 1
        [g] = estimate.projected_grads
        v = 0.9 * v + 0.1 * g * g
        m = beta1 * m + (1 - beta1) * dense(estimate, start.numel())
        target -= LR * m / (1 - beta1**t) / (math.sqrt(v / (1 - 0.9**t)) + 1e-3)
    assert_moved_as(model, start, target)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("estimator", [CentralDifference(1e-3, 4), GuidingVector(1e-3, 4)], ids=["n-SPSA", "GV"])
def test_scalar_adams_first_step_has_the_size_of_the_learning_rate(estimator: Any, factor: float):
    """Whatever the scale of the objective and the number of directions; for GV their signs cancel."""
    torch.manual_seed(0)
    model = nn.Linear(100, 100, bias=False)
    start, slope = flat(model), torch.randn(100, 100)
    optimizer = MeZO(model.named_parameters(), lr=LR, update=ScalarAdam(zeta=1e-12))
    evaluate = Copy(optimizer.space)(lambda: factor * (model.weight.double() * slope).sum().float()[None])
    optimizer.step(estimate=estimator.estimate(evaluate, seed=1))
    assert float((flat(model) - start).square().mean().sqrt()) == pytest.approx(LR, rel=0.05)


@pytest.mark.parametrize(
    "update", [Momentum(0.0), ScalarAdam(zeta=1e-30), DenseMomentum()], ids=["momentum", "scalar adam", "dense"]
)
def test_without_memory_a_step_has_the_terms_of_its_estimate(update: Update):
    optimizer = MeZO(make_model().named_parameters(), lr=LR, update=update, sampler=LowRank(refresh_right=2))
    for estimate in estimates(3, queries=2):
        step = optimizer._make_step(*optimizer._advance(estimate))
        assert tuple(seed for seed, _ in step.terms) == estimate.seeds
        optimizer.step(estimate=estimate)


# -- decay towards the start -------------------------------------------------------------------------------------------


def test_decay_towards_the_start_is_the_formula():
    """Of matrices only, as decay towards zero."""
    model, given = make_model(), list(estimates(12, 2))
    start = flat(model).double()
    decayed = torch.cat([torch.full((p.numel(),), float(p.dim() >= 2)) for p in model.parameters()]).double()
    run(model, given, weight_decay=100.0, decay_towards="start")
    target = start.clone()
    for estimate in given:
        if estimate.seeds:
            target += -LR * 100.0 * decayed * (target - start) - LR * dense(estimate, start.numel())
    assert_moved_as(model, start, target)


def test_a_pull_that_is_less_than_a_weights_last_bit_is_not_lost():
    """Weights just above 1 have bits of 1.2e-7; each is pulled by 5e-9 a step, and moved there and back by 1e-6."""
    model = nn.Linear(200, 50, bias=False).requires_grad_(False)
    weight = nn.init.ones_(model.weight).requires_grad_(True).data
    optimizer = MeZO(model.named_parameters(), lr=1e-6, weight_decay=500.0, decay_towards="start")
    optimizer.step(estimate=GradientEstimate((1,), (0.0,)))
    weight.add_(1e-5)
    away = float((weight.double() - 1).mean())
    for step in range(1000):
        optimizer.step(estimate=GradientEstimate((step // 2,), (-1.0 if step % 2 else 1.0,)))
    left = float((weight.double() - 1).mean()) / away
    assert left == pytest.approx((1 - 5e-4) ** 1000, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_step_does_not_move_keeps_its_bytes(dtype: torch.dtype):
    """At lr = 0, and at the start with a tie, where there is nothing to be pulled back from."""
    for lr, given in ((0.0, list(estimates(6))), (LR, [GradientEstimate((1,), (0.0,))] * 3)):
        model = make_model(dtype)
        optimizer = MeZO(model.named_parameters(), lr=lr, weight_decay=0.5, decay_towards="start", update=Momentum())
        for estimate in given:
            optimizer.step(estimate=estimate)
        assert same_bytes(model, make_model(dtype))


# -- runs --------------------------------------------------------------------------------------------------------------

OPTIONS: list[dict[str, Any]] = [
    *({"update": update} for update in UPDATES[1:]),
    ANCHORED,
    ANCHORED | {"update": Momentum(0.8, 3), "sampler": LowRank(2, "diagonal", 0, 0)},
    {"update": DenseMomentum(0.8)},
    DENSE,
]


def logged(path: Path, dtype: torch.dtype, options: dict[str, Any], cut: int | None = None) -> nn.Module:
    """A run of ten steps with a schedule; from step ``cut`` on it is another process's, given the state in a file."""
    model, given = make_model(dtype), list(estimates(10, 2))

    def begin(model: nn.Module) -> tuple[MeZO, torch.optim.lr_scheduler.LRScheduler]:
        optimizer = MeZO(model.named_parameters(), lr=1e-3, **options)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 5)  # 0 at first

    optimizer, scheduler = begin(model)
    optimizer.trajectory = Trajectory.create(path, Header.of(optimizer.space))
    for step, estimate in enumerate(given):
        if step == cut:
            optimizer.trajectory.close()
            file = io.BytesIO()
            torch.save([thing.state_dict() for thing in (model, optimizer, scheduler)], file)
            file.seek(0)
            weights, *states = torch.load(file, weights_only=True)
            model = make_model(dtype)
            model.load_state_dict(weights)  # before there is an optimizer, as Lightning does it
            optimizer, scheduler = begin(model)
            for thing, state in zip((optimizer, scheduler), states, strict=True):
                thing.load_state_dict(state)
            optimizer.trajectory = Trajectory.open(path, append=True)
        optimizer.step(estimate=estimate)
        scheduler.step()
    assert optimizer.trajectory is not None
    optimizer.trajectory.close()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(map(str, options.values())))
def test_resume_and_replay_give_the_bytes_of_the_run(tmp_path: Path, options: dict[str, Any], dtype: torch.dtype):
    model = logged(tmp_path / "whole", dtype, options)
    assert not same_bytes(model, make_model(dtype))
    for cut in (0, 4, 8):
        assert same_bytes(logged(tmp_path / str(cut), dtype, options, cut), model)
        assert (tmp_path / str(cut)).read_bytes() == (tmp_path / "whole").read_bytes()
    with closing(Trajectory.open(tmp_path / "whole")) as trajectory:
        replay(replayed := make_model(dtype), trajectory)
    assert same_bytes(replayed, model)


@pytest.mark.parametrize("options", [ANCHORED | {"update": Momentum(0.8, 3)}, DENSE], ids=["anchored", "dense"])
def test_shards_and_steps_one_by_one_give_the_same_bytes(tmp_path: Path, options: dict[str, Any]):
    """Pieces of weights that begin and end anywhere, as `mezo replay` and ZeRO-3 have them."""
    model = logged(tmp_path / "t", torch.float32, options)
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        steps, table, sampler = list(trajectory), trajectory.header.table, trajectory.header.make_sampler()
    for cuts in ([7], [0, 1, 53, 54, 55, 60, 95]):
        other = make_model()
        named = dict(other.named_parameters())
        for begin, end in zip([0, *cuts], [*cuts, 10**6], strict=True):
            pieces = [
                Slice(info, named[info.name], low, high - low)
                for info in table
                for low, high in [(max(begin, info.start) - info.start, min(end, info.start + info.numel) - info.start)]
                if low < high
            ]
            if pieces:
                space = ParameterSpace(pieces, table, sampler, "stochastic")
                for step in steps:
                    space.apply([step])
        assert same_bytes(other, model)


@pytest.mark.parametrize("options", [{}, {"update": Momentum(0.5, 2)}, {"update": ScalarAdam()}], ids=str)
def test_a_log_may_begin_in_the_middle_of_a_run(tmp_path: Path, options: dict[str, Any]):
    model, given = make_model(), list(estimates(8))
    optimizer = run(model, given[:4], **options)
    middle = {name: value.clone() for name, value in model.state_dict().items()}
    with closing(Trajectory.create(tmp_path / "t", Header.of(optimizer.space))) as optimizer.trajectory:
        for estimate in given[4:]:
            optimizer.step(estimate=estimate)
    other = make_model()
    other.load_state_dict(middle)
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        replay(other, trajectory)
    assert same_bytes(other, model)


@pytest.mark.parametrize(
    ("options", "dtype", "words"),
    [
        (ANCHORED, torch.float32, "decay_towards='start' keeps"),
        (DENSE, torch.float32, "update=Dense.* keeps"),
        ({"rounding": "compensated"}, torch.bfloat16, "rounding='compensated' keeps"),
    ],
)
def test_but_not_where_something_is_kept_beside_the_weights(
    tmp_path: Path, options: dict[str, Any], dtype: torch.dtype, words: str
):
    model, given = make_model().to(dtype), list(estimates(3))
    optimizer = run(model, given[:2], **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with closing(Trajectory.create(tmp_path / "t", Header.of(optimizer.space))) as optimizer.trajectory:
        with pytest.raises(ValueError, match=rf"begin after 2 steps, .* without what {words} beside the weights"):
            optimizer.step(estimate=given[2])
        assert not len(optimizer.trajectory)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_header_says_what_steps_do_not_and_others_are_as_they_were():
    old, anchored, moments = (
        Header.of(MeZO(make_model().named_parameters(), **options).space)
        for options in ({"weight_decay": 0.1}, ANCHORED, {"update": DenseMomentum(0.5)})
    )
    assert b"decay_towards" not in old.to_json()
    assert b"update" not in old.to_json()
    for header in (old, anchored, moments):
        assert Header.from_json(header.to_json()) == header
    assert (old.decay_towards, anchored.decay_towards) == ("zero", "start")
    assert (old.update, moments.update) == ({}, {"name": "DenseMomentum", "beta": 0.5})
    with pytest.raises(ValueError, match="update 'Shampoo' is unknown; known are DenseMomentum, DenseAdam"):
        replace(moments, update={"name": "Shampoo"}).make_rule()


def test_a_skipped_step_leaves_the_memory_alone():
    optimizer = run(make_model(), list(estimates(3)), update=ScalarAdam(0.5))
    before = optimizer.state_dict()["update"]
    optimizer.step(estimate=GradientEstimate(skipped="all samples failed"))
    assert optimizer.state_dict()["update"] == before


def test_one_description_serves_several_runs():
    """What is remembered is the optimizer's: a rule in a configuration is built once."""
    update = Momentum()
    first = run(make_model(), list(estimates(3)), update=update)
    second = MeZO(make_model().named_parameters(), update=update)
    assert first._memory.estimates
    assert not second._memory.estimates


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Momentum(1.0), r"Momentum\(beta=1.0\) must be at least 0 and below 1"),
        (lambda: Momentum(window=0), r"Momentum\(window=0\) must be at least 1 step"),
        (lambda: ScalarAdam(-0.1), r"ScalarAdam\(beta1=-0.1\) must be"),
        (lambda: ScalarAdam(beta2=float("nan")), r"ScalarAdam\(beta2=nan\) must be"),
        (lambda: ScalarAdam(zeta=0.0), r"ScalarAdam\(zeta=0.0\) must be a positive number"),
        (lambda: ScalarAdam(window=0), r"ScalarAdam\(window=0\) must be"),
        (lambda: DenseMomentum(1.0), r"DenseMomentum\(beta=1.0\) must be at least 0 and below 1"),
        (lambda: DenseAdam(beta2=1.0), r"DenseAdam\(beta2=1.0\) must be"),
        (lambda: DenseAdam(zeta=1e-40), r"DenseAdam\(zeta=1e-40\) must be a positive number, such as 1e-8"),
    ],
)
def test_wrong_numbers_are_refused_by_name(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"update": Momentum(), "sampler": LowRank()},
            r"with sampler=LowRank\(.*a seed gives other ones by then: use G",
        ),
        (
            {"update": Trail(), "sampler": LowRank()},
            r"update=Trail\(.*\) is for the estimator Cone, which applies the directions of earlier steps again",
        ),
        ({"update": ScalarAdam(0.5), "sampler": Subset()}, r"update=ScalarAdam\(beta1=0.5.*with sampler=Subset"),
        ({"decay_towards": "base"}, "decay_towards='base' is unknown; choose 'zero' or 'start'"),
        ({"decay_towards": "start"}, "does nothing without weight_decay"),
        (
            {"decay_towards": "start", "weight_decay": 0.1, "rounding": "master"},
            "rounding='master' both keep something beside the weights, and only one may: use rounding='stochastic'",
        ),
        (
            {"update": DenseAdam(), "rounding": "compensated"},
            r"update=DenseAdam\(.*\) and rounding='compensated' both .*, or an update without dense moments \(Momentum",
        ),
        (ANCHORED | {"update": DenseMomentum()}, r"decay_towards='start' and update=DenseMomentum\(.*\) both keep"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeZO(make_model(torch.bfloat16).named_parameters(), **options)


@pytest.mark.parametrize("sampler", [Rademacher(), LowRank(2, "identity", 0, None), LowRank(2, "dense", None, None)])
def test_directions_that_stay_go_with_momentum(sampler: Sampler):
    model = make_model()
    table = MeZO(model.named_parameters(), update=Momentum(), sampler=sampler).space.table
    first, later = (sampler.bind(table).fill(torch.empty(30), 5, 0, number) for number in (0, 1000))
    assert torch.equal(first, later)


def test_the_state_of_another_rule_is_refused():
    options = {"weight_decay": 0.1}
    plain = run(make_model(), list(estimates(2)), **options).state_dict()
    for other, message in (
        ({"update": Momentum()}, "saved with update=none, this optimizer has update=Momentum"),
        ({"decay_towards": "start"}, "saved with decay_towards=zero, this optimizer has decay_towards=start"),
        ({"sampler": Rademacher()}, r"saved with sampler=Gaussian\(\), this optimizer has sampler=Rademacher\(\)"),
    ):
        optimizer = MeZO(make_model().named_parameters(), **options, **other)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(plain)
    older = {key: value for key, value in plain.items() if key not in ("update", "decay_towards", "sampler")}
    MeZO(make_model().named_parameters(), **options).load_state_dict(older)
    moments = run(make_model(), list(estimates(2)), update=DenseMomentum(0.9)).state_dict()
    with pytest.raises(ValueError, match=r"update=DenseMomentum\(beta=0.9\), this .*beta=0.5\): go on with the same"):
        MeZO(make_model().named_parameters(), update=DenseMomentum(0.5)).load_state_dict(moments)


def test_a_recorded_step_cannot_be_repeated_by_a_rule_that_has_to_see_estimates():
    model = make_model()
    optimizer = MeZO(model.named_parameters(), update=Momentum())
    with pytest.raises(ValueError, match=r"cannot repeat them, .*: resume with model.rewind=true"):
        optimizer.step(recorded=Step(((1, (0.5,)),), (0.0,)))
    assert same_bytes(model, make_model())


def test_a_later_step_without_the_start_or_moments_is_refused():
    space = MeZO(make_model().named_parameters()).space
    with pytest.raises(
        ValueError, match=r"step 7 goes on with the moments of DenseMomentum\(beta=0.9\), which are not"
    ):
        space.apply([Step(((1, (0.5,)),), (0.0,), 7, rule=DenseMomentum(), rates=(0.1,))])
    with pytest.raises(ValueError, match="step 7 decays towards the weights that the run started from"):
        space.apply([Step(((1, (0.5,)),), (0.1,), 7, "start")])
