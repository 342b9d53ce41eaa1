"""The evaluator that runs each row of a batch along a direction of its own: right, without a trace, or refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from mezo_lightning import (
    GRZO,
    CentralDifference,
    Copy,
    Flipout,
    Gaussian,
    LeafScratch,
    MeZO,
    Point,
    Rademacher,
    Rowwise,
)
from mezo_lightning.evaluators import Evaluator, Samples
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.rowwise.points import RowPoint, row_seed, rows_that_run, running
from mezo_lightning.samplers import derive_seed

ROWS, EPSILON, SEED = 5, 2.0**-6, 7
POINTS = [RowPoint(SEED, EPSILON, "rows+"), RowPoint(SEED, -EPSILON, "rows-")]
IDS = torch.randint(3, 300, (ROWS, 9), generator=torch.Generator().manual_seed(0))
IDS[3] = IDS[1]  # equal rows have directions of their own
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0


class Mlp(nn.Module):
    """Layers, norms, a vector that scales, one that is added, and a number; on vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.bare = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 6, bias=False)
        self.norm, self.rms = nn.LayerNorm(8), nn.RMSNorm(6)
        self.scale, self.shift = nn.Parameter(torch.randn(6)), nn.Parameter(torch.randn(6))
        self.size = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        assert self.scale.dtype == x.dtype  # asking for what is not the values is no use of them
        x = x + self.down(torch.tanh(self.norm(self.up(x))))
        return self.bare(self.rms(x) * self.scale + self.shift) * self.size


def optimizer_of(model: nn.Module, sampler: Any = None) -> MeZO:
    return MeZO(model.named_parameters(), lr=1e-2, sampler=sampler or Flipout())


def rowwise(model: nn.Module, space: ParameterSpace) -> Rowwise:
    return Rowwise(model, space, Copy(space))


def losses(model: nn.Module, ids: Tensor = IDS, mask: Tensor = MASK) -> Callable[[], Tensor]:
    """The loss of each row; the logits of all tokens, some of them behind padding, have a part in it."""

    def objective() -> Tensor:
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)

    return objective


def row_by_row(space: ParameterSpace, objective: Callable[[], Tensor]) -> Tensor:
    """[2, rows]: what it must be, by giving the whole model the weights of one row after another."""
    evaluate = Copy(space)(objective)
    points = [Point(((row_seed(SEED, row), p.coefficient),)) for p in POINTS for row in range(ROWS)]
    values = evaluate(points).values.view(2, ROWS, ROWS)
    return values.diagonal(dim1=1, dim2=2)


def assert_right(model: nn.Module, objective: Callable[[], Tensor], space: ParameterSpace) -> None:
    found, expected = rowwise(model, space)(objective)(POINTS).values, row_by_row(space, objective)
    at_theta = Copy(space)(objective)([Point()]).values[0]
    assert float((expected - at_theta).abs().mean()) > 1e-3  # far more than rounding
    assert torch.allclose(found, expected, rtol=2e-6, atol=2e-6)


# -- right -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [Gaussian(), Rademacher()], ids=str)
def test_each_row_sees_the_weights_of_its_own_direction(model: PreTrainedModel, inner: Any):
    """OPT, which flattens rows and tokens; GPT-2 with transposed matrices, one row of positions and tied weights; and
    Llama, whose norms are products."""
    assert_right(model, losses(model), optimizer_of(model, Flipout(inner)).space)


@pytest.mark.parametrize("shape", [(ROWS, 6), (ROWS, 3, 6), (ROWS, 2, 3, 6)], ids=str)
def test_a_network_on_vectors(shape: tuple[int, ...]):
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(shape)
    assert_right(model, lambda: model(x).double().square().flatten(1).mean(1), optimizer_of(model).space)


def test_what_is_frozen_stays(make_model: Callable[..., PreTrainedModel]):
    for kind, pattern in (("opt", "bias"), ("opt", "weight"), ("gpt2", "c_attn"), ("llama", "norm")):
        model = make_model(kind)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(pattern in name)
        assert_right(model, losses(model), optimizer_of(model).space)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between PEFT and transformers
def test_lora(make_model: Callable[..., PreTrainedModel]):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model: Any = get_peft_model(make_model("opt"), config).eval()
    assert_right(model, losses(model), optimizer_of(model).space)


def test_16_bit_weights(make_model: Callable[..., PreTrainedModel]):
    """As near to the row-by-row values as rounding lets two ways of computing them be."""
    model: Any = make_model("opt")
    model.to(torch.bfloat16)
    space, objective = optimizer_of(model, Flipout(Rademacher())).space, losses(model)
    found, expected = rowwise(model, space)(objective)(POINTS).values, row_by_row(space, objective)
    exact_model: Any = make_model("opt")
    exact_model.to(torch.bfloat16).float()
    exact = row_by_row(optimizer_of(exact_model, Flipout(Rademacher())).space, losses(exact_model))
    assert float((found - exact).abs().mean()) < 2 * float((expected - exact).abs().mean()) + 1e-3


def test_completions_are_those_of_each_rows_own_weights(make_model: Callable[..., PreTrainedModel]):
    model: Any = make_model("opt")
    space, texts = optimizer_of(model).space, []
    points = [RowPoint(SEED, 2.0**-4, "rows+")]

    def write() -> Tensor:
        texts.append(model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)[:, 9:])
        return torch.zeros(ROWS)

    rowwise(model, space)(write)(points)
    Copy(space)(write)([Point(), *(Point(((row_seed(SEED, row), 2.0**-4),)) for row in range(ROWS))])
    found, base, *alone = texts
    assert torch.equal(found, torch.stack([alone[row][row] for row in range(ROWS)]))
    assert not torch.equal(found, base)


def test_directions_change_with_the_step(make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    optimizer = optimizer_of(model)
    evaluate = rowwise(model, optimizer.space)(losses(model))
    first = evaluate(POINTS).values
    assert torch.equal(evaluate(POINTS).values, first)
    optimizer.load_state_dict({**optimizer.state_dict(), "steps": 5})
    assert not torch.allclose(evaluate(POINTS).values, first, rtol=1e-4)


# -- the algorithm -----------------------------------------------------------------------------------------------------


def materialised(model: nn.Module, step: int, row: int) -> Tensor:
    """A row's direction, of U that is drawn for the step over all parameters, and of the row's own signs.

    Of these there is one vector, which has those of each parameter's rows and then of its columns.
    """
    shared = Gaussian().fill(torch.empty(sum(p.numel() for p in model.parameters())), derive_seed(0, 0, step), 0)
    sides = [(p.shape[0], p.numel() // p.shape[0]) if p.dim() > 1 else (p.numel(), 0) for p in model.parameters()]
    signs = Rademacher().fill(torch.empty(sum(map(sum, sides))), row_seed(step, row), 0)
    result, at, first = [], 0, 0
    for parameter, (rows, columns) in zip(model.parameters(), sides, strict=True):
        u = shared[at : at + parameter.numel()].view(parameter.shape)
        r, s = signs[first : first + rows], signs[first + rows : first + rows + columns]
        result.append((u * (torch.outer(r, s) if columns else r).view(u.shape)).flatten())
        at, first = at + parameter.numel(), first + rows + columns
    return torch.cat(result)


@pytest.mark.parametrize("normalize", [True, False])
def test_against_the_algorithm_written_out(normalize: bool):
    """Materialised U, r and s, a copy of the model for every row and side, and a dense update."""
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(ROWS, 6)
    reference, optimizer = copy.deepcopy(model), optimizer_of(model)
    evaluate = rowwise(model, optimizer.space)(lambda: model(x).double().square().mean(1))
    for step in range(3):
        directions, differences = [], []
        for row in range(ROWS):
            z, values = materialised(reference, step, row), []
            for side in (EPSILON, -EPSILON):
                moved, at = copy.deepcopy(reference), 0
                for parameter in moved.parameters():
                    parameter.data += side * z[at : at + parameter.numel()].view(parameter.shape)
                    at += parameter.numel()
                with torch.no_grad():
                    values.append(float(moved(x[row : row + 1]).double().square().mean()))
            directions.append(z)
            differences.append(values[0] - values[1])
        d = torch.tensor(differences)
        if normalize:
            d = d / (d - d.mean()).square().mean().sqrt()
        update, at = (d[:, None] / (2 * EPSILON) * torch.stack(directions)).mean(0), 0
        for parameter in reference.parameters():
            parameter.data -= 1e-2 * update[at : at + parameter.numel()].view(parameter.shape)
            at += parameter.numel()
        optimizer.step(estimate=GRZO(EPSILON, normalize).estimate(evaluate, seed=step))
        for one, other in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(one, other, rtol=2e-3, atol=2e-4 * (1 + float(update.abs().max())))


def test_it_lowers_a_loss():
    torch.manual_seed(0)
    model, x = Mlp(), torch.randn(16, 6)
    optimizer = MeZO(model.named_parameters(), lr=2e-4, sampler=Flipout())
    evaluate = rowwise(model, optimizer.space)(lambda: model(x).double().square().mean(1))
    plain = Copy(optimizer.space)(lambda: model(x).double().square().mean(1))
    before = plain([Point()]).means[0]
    for step in range(25):
        optimizer.step(estimate=GRZO(1e-2).estimate(evaluate, seed=step))
    assert plain([Point()]).means[0] < 0.7 * before


# -- no trace ----------------------------------------------------------------------------------------------------------


def test_no_trace_also_where_the_objective_fails(make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    space = optimizer_of(model).space
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluator, plain = rowwise(model, space), losses(model)
    expected = evaluator(plain)(POINTS).values

    def failing(*_: Any) -> None:
        raise KeyboardInterrupt

    for module in (model, *list(model.modules())[-3:]):
        handle = module.register_forward_pre_hook(failing)
        with pytest.raises(KeyboardInterrupt):
            evaluator(plain)(POINTS)
        handle.remove()
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(evaluator(plain)(POINTS).values, expected)
    for name, value in model.state_dict().items():
        assert torch.equal(value.view(-1).view(torch.uint8), before[name].view(-1).view(torch.uint8)), name


def test_other_points_are_left_to_another_evaluator(make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    space = optimizer_of(model).space
    for plain in (Copy(space), LeafScratch(model, space)):
        estimator = CentralDifference(1e-2, 2)
        found = estimator.estimate(Rowwise(model, space, plain)(losses(model)), seed=1)
        assert found.projected_grads == estimator.estimate(plain(losses(model)), seed=1).projected_grads


# -- which rows run ----------------------------------------------------------------------------------------------------


def test_declared_parts_of_a_batch_are_its_rows(make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    space = optimizer_of(model).space
    whole = rowwise(model, space)(losses(model))(POINTS).values

    def in_parts() -> Tensor:
        values = {}
        for rows in ([3, 4], [0], [2, 1]):
            with running(rows):
                values |= zip(rows, losses(model, IDS[rows], MASK[rows])(), strict=True)
        return torch.stack([values[row] for row in range(ROWS)])

    assert torch.allclose(rowwise(model, space)(in_parts)(POINTS).values, whole, rtol=2e-6, atol=2e-6)
    assert rows_that_run() is None


def test_a_row_may_be_several_sequences(make_model: Callable[..., PreTrainedModel]):
    model, twice = make_model("opt"), [row for row in range(ROWS) for _ in range(2)]
    space = optimizer_of(model).space

    def doubled() -> Tensor:
        with running(range(ROWS)), running(twice):
            return losses(model, IDS[twice], MASK[twice])().view(ROWS, 2).mean(1)

    whole = rowwise(model, space)(losses(model))(POINTS).values
    assert torch.allclose(rowwise(model, space)(doubled)(POINTS).values, whole, rtol=2e-6, atol=2e-6)


def test_declared_rows_count_within_those_around_them():
    with running([4, 6, 7]), running([0, 0, 2]):
        assert rows_that_run() == (4, 4, 7)
    with pytest.raises(RuntimeError), running([1]):
        raise RuntimeError
    assert rows_that_run() is None


# -- refused -----------------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """A table of positions that is sliced."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(9, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.table[: x.shape[1]])


class Conv(nn.Conv1d):
    def __init__(self) -> None:
        super().__init__(4, 2, 1)


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class SequenceFirst(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(0, 1)).transpose(0, 1)


class Transposed(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Routed(nn.Linear):
    """Some of the tokens only, as an expert gets them."""

    def __init__(self) -> None:
        super().__init__(6, 6)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1)[:10])


class Idle(nn.Linear):
    def __init__(self) -> None:
        super().__init__(6, 6)
        self.idle = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Table, r"'table' is used in torch.Tensor.__getitem__: rows cannot have directions.*freeze it"),
        (Conv, r"'weight' and 'bias' is used in torch.nn.functional.conv1d|torch.conv1d"),
        (Lstm, r"'lstm.weight_ih_l0' and .* is used in .*lstm"),
        (SequenceFirst, r"shape \(4, 5, 6\), which do not begin with the batch's 5 rows"),
        (Transposed, r"'weight' is used in torch.Tensor.T.__get__"),
        (Routed, r"shape \(10, 6\), which do not begin"),
        (Idle, r"2 trainable parameters had no part in the model's forward \(idle.bias, idle.weight\)"),
    ],
)
def test_what_rows_cannot_have_directions_of_their_own_in(model: Callable[[], nn.Module], message: str):
    torch.manual_seed(0)
    made, x = model(), torch.randn(ROWS, 4, 6)
    with pytest.raises(ValueError, match=message):
        rowwise(made, optimizer_of(made).space)(lambda: made(x).square().flatten(1).mean(1)[:1].expand(ROWS))(POINTS)


def test_weights_used_outside_of_the_model(make_model: Callable[..., PreTrainedModel]):
    model: Any = Mlp()
    space, x = optimizer_of(model).space, torch.randn(ROWS, 6)
    with pytest.raises(ValueError, match=r"'bare.weight' is used in .*linear outside of the model's forward"):
        rowwise(model, space)(lambda: F.linear(model(x), model.bare.weight).mean(1))(POINTS)


def test_positions_without_rows():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.embed(torch.arange(ROWS))

    model = Positions()
    with pytest.raises(ValueError, match=r"ids of shape \(5,\), which do not begin with the batch's 5 rows"):
        rowwise(model, optimizer_of(model).space)(lambda: model(torch.zeros(ROWS, ROWS, 4)).mean((1, 2)))(POINTS)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda model: losses(model)().mean(), r"gave 1 values, but the model ran on 5 rows"),
        (lambda model: losses(model)().repeat(2), r"gave 10 values, but the model ran on 5 rows"),
        (
            lambda model: torch.cat([losses(model, IDS[:3], MASK[:3])(), losses(model, IDS[3:], MASK[3:])()]),
            r"runs on 2 rows, and ran on 3 before .*mezo_lightning.rowwise.points.running",
        ),
    ],
)
def test_rows_that_nobody_can_tell(objective: Any, message: str, make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    with pytest.raises(ValueError, match=message):
        rowwise(model, optimizer_of(model).space)(lambda: objective(model))(POINTS)


def test_too_few_declared_rows(make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")

    def objective() -> Tensor:
        with running([0, 1]):
            return losses(model)()

    with pytest.raises(ValueError, match="runs on 5 rows, but 2 were declared"):
        rowwise(model, optimizer_of(model).space)(objective)(POINTS)


@pytest.mark.parametrize("kind", [Copy, LeafScratch])
def test_evaluators_that_give_all_rows_the_same_weights(kind: Any, make_model: Callable[..., PreTrainedModel]):
    model = make_model("opt")
    space = optimizer_of(model, Gaussian()).space
    evaluator: Evaluator = Copy(space) if kind is Copy else LeafScratch(model, space)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"a direction for each row of the batch \(GRZO\).*`sampler: Flipout`"):
        GRZO().estimate(evaluator(losses(model)), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="Rowwise needs the sampler Flipout, not Gaussian"):
        Rowwise(model, space, evaluator)


def test_samples_that_fail_on_one_side_have_no_part(make_model: Callable[..., PreTrainedModel]):
    model, calls = make_model("opt"), []

    def objective() -> Samples:
        calls.append(None)
        valid = torch.ones(ROWS, 1, dtype=torch.bool)
        valid[2] = len(calls) != 2
        return Samples(losses(model)()[:, None], valid)

    estimate = GRZO().estimate(rowwise(model, optimizer_of(model).space)(objective), seed=SEED)
    assert estimate.seeds == tuple(row_seed(SEED, row) for row in (0, 1, 3, 4))
