"""Promise 2: evaluators agree with one another bit for bit, and leave no trace, whatever goes wrong."""

import contextlib
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from mezo_lightning.evaluators import Copy, Evaluation, Evaluator, Preferences, Samples
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.samplers import Gaussian
from mezo_lightning.steps import Point

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
POINTS = [Point(), Point(((1, 1e-2),), label="up"), Point(((1, -1e-2),)), Point(), Point(((2, 1e-3), (3, -2e-2)))]
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8]])


class Tied(nn.Module):
    """An embedding, a block that owns parameters beside its children, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.scale = nn.Parameter(torch.rand(6))
        self.up, self.down, self.norm = nn.Linear(6, 9), nn.Linear(9, 6), nn.LayerNorm(6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.scale * self.down(torch.tanh(self.up(x)))
        return self.head(self.norm(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(10, 6, padding_idx=1), nn.LSTM(6, 7, 2, batch_first=True)
        self.head = nn.Linear(7, 10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


class Shared(nn.Module):
    """One module run twice, one weight in two modules of which one calls the other, and a position table."""

    class Outer(nn.Module):
        def __init__(self, inner: nn.Linear):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.inner(x), self.weight)

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(10, 6))

        def forward(self, count: int) -> Tensor:
            return self.table[:count]  # a view of the weights, not a copy

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions, self.twice = nn.Embedding(10, 6), self.Positions(), nn.Linear(6, 6)
        self.outer, self.head = self.Outer(nn.Linear(6, 6)), nn.Linear(6, 10)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.positions(ids.shape[1])
        x = torch.tanh(self.twice(self.twice(self.embed(input=ids))))
        return self.head(self.outer(x + positions))


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


class Normed(nn.Module):
    """Weights that are computed from parameters, by an old-style hook and by a parametrization."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        with pytest.warns(FutureWarning, match="weight_norm"):
            self.old = nn.utils.weight_norm(nn.Linear(6, 6))
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(6, 10))
        self.embed.register_forward_hook(double)

    def forward(self, ids: Tensor) -> Tensor:
        return self.new(torch.tanh(self.old(self.embed(ids))))


class Logits(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def tiny_opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=10,
        hidden_size=8,
        ffn_dim=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        word_embed_proj_dim=4,
        tie_word_embeddings=True,
    )
    return Logits(OPTForCausalLM(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "lstm": Recurrent,
    "shared": Shared,
    "normed": Normed,
    "opt": tiny_opt,
}


def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, MeZO]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    return model, MeZO(model.named_parameters(), lr=1e-3)


def losses(model: nn.Module) -> Callable[[], Tensor]:
    def objective() -> Tensor:
        logits = model(IDS).float()
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)

    return objective


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value.contiguous().view(torch.uint8), before[name].contiguous().view(torch.uint8)), name


def evaluators(model: nn.Module, optimizer: MeZO) -> list[Evaluator]:
    return [Copy(optimizer.space), LeafScratch(model, optimizer.space)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_evaluators_agree_bit_for_bit_and_leave_no_trace(name: str, dtype: torch.dtype):
    model, optimizer = make(name, dtype)
    before = snapshot(model)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    copy, leaf = (evaluator(losses(model)) for evaluator in evaluators(model, optimizer))
    expected = copy(POINTS)
    assert_untouched(model, before)
    for _ in range(2):
        assert torch.equal(leaf(POINTS).values, expected.values)
        assert_untouched(model, before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert not torch.equal(expected.values[0], expected.values[1])
    assert torch.equal(expected.values[0], expected.values[3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_values_are_those_of_a_model_that_was_moved_by_hand(name: str, dtype: torch.dtype):
    model, optimizer = make(name, dtype)
    values = Copy(optimizer.space)(losses(model))(POINTS).values
    moved, _ = make(name, dtype)
    start = 0
    for _, parameter in moved.named_parameters():
        direction = Gaussian().fill(torch.empty(parameter.numel()), 1, start).view(parameter.shape)
        parameter.data = (parameter.data.float() + POINTS[1].terms[0][1] * direction).to(dtype)
        start += parameter.numel()
    with torch.inference_mode():
        assert torch.equal(losses(moved)().double(), values[1])


@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters_stay_where_they_are(name: str):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    optimizer = MeZO(model.named_parameters(), lr=1e-3)
    copy, leaf = (evaluator(losses(model))(POINTS) for evaluator in evaluators(model, optimizer))
    assert torch.equal(copy.values, leaf.values)


def test_gradients_still_work_afterwards():
    model, optimizer = make("tied")
    for evaluator in evaluators(model, optimizer):
        evaluator(losses(model))(POINTS)
        model.zero_grad()
        losses(model)().mean().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        torch.optim.SGD(model.parameters(), lr=1e-3).step()


@pytest.mark.parametrize("kind", [Copy, LeafScratch])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_an_exception_anywhere_leaves_no_trace(kind: type[Evaluator], error: type[BaseException], call: int):
    """In the objective before, in the middle of and after the forward; and then everything works as before."""
    model, optimizer = make("tied", torch.bfloat16)
    before = snapshot(model)
    evaluator = Copy(optimizer.space) if kind is Copy else LeafScratch(model, optimizer.space)
    expected = evaluator(losses(model))(POINTS).values
    plain = losses(model)

    def failing(where: str) -> Callable[[], Tensor]:
        calls = 0

        def objective() -> Tensor:
            nonlocal calls
            calls += 1
            if calls == call and where == "before":
                raise error
            values = plain()
            if calls == call and where == "after":
                raise error
            return values

        return objective

    for where in ("before", "after"):
        with pytest.raises(error):
            evaluator(failing(where))(POINTS)
        assert_untouched(model, before)
    forwards = 0

    def fail(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        if forwards == call:
            raise error

    for module in (model, *model.children()):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            forwards, handle = 0, register(fail)
            with pytest.raises(error):
                evaluator(plain)(POINTS)
            handle.remove()
            assert_untouched(model, before)
            assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(evaluator(plain)(POINTS).values, expected)
    assert_untouched(model, before)


def test_a_forward_that_catches_an_exception_does_not_leave_old_weights_behind():
    class Patient(Tied):
        def forward(self, ids: Tensor) -> Tensor:
            with contextlib.suppress(RuntimeError):
                self.down(ids.new_zeros(2, 5, dtype=self.scale.dtype))  # the wrong width, in the middle of a module
            return super().forward(ids)

    torch.manual_seed(0)
    model = Patient().eval()
    optimizer = MeZO(model.named_parameters())
    copy, leaf = (evaluator(losses(model))(POINTS) for evaluator in evaluators(model, optimizer))
    assert torch.equal(copy.values, leaf.values)


def test_parameters_that_no_forward_uses_are_refused_by_leaf_scratch():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    optimizer = MeZO(model.named_parameters())
    x = torch.randn(2, 3, 8)
    before = snapshot(model)

    def objective() -> Tensor:
        return model(x, x, x)[0].square().mean((1, 2))

    assert torch.isfinite(Copy(optimizer.space)(objective)(POINTS).values).all()
    with pytest.raises(ValueError, match=r"out_proj.*evaluator Copy"):
        LeafScratch(model, optimizer.space)(objective)(POINTS)
    assert_untouched(model, before)


def test_leaf_scratch_needs_no_copy_of_the_model():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(50, 50) for _ in range(20)), *(nn.LayerNorm(50) for _ in range(20)))
    leaf = LeafScratch(model, MeZO(model.named_parameters()).space)
    assert leaf._scratch.numel() == 4 * 2 * 50
    assert leaf._block.numel() == 4 * 50 * 50


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_linear_layer_of_several_blocks_is_that_of_a_copy(bias: bool, dtype: torch.dtype):
    torch.manual_seed(0)
    model = nn.Linear(1000, 1201, bias=bias).to(dtype)
    optimizer = MeZO(model.named_parameters())
    x = torch.randn(2, 3, 1000).to(dtype)
    seen: list[Tensor] = []

    def objective() -> Tensor:
        seen.append(model(x))
        return seen[-1].float().mean((1, 2))

    copy, leaf = evaluators(model, optimizer)
    assert leaf._block.numel() == 601 * 1000 * dtype.itemsize
    copy(objective)(POINTS)
    leaf(objective)(POINTS)
    for expected, found in zip(seen[: len(POINTS)], seen[len(POINTS) :], strict=True):
        # Products of blocks may be summed in another order, no more.
        torch.testing.assert_close(found, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert found.shape == (2, 3, 1201)


# -- masking -----------------------------------------------------------------------------------------------------------


def reference_means(values: Tensor, valid: Tensor) -> tuple[list[Fraction], list[bool]]:
    """The rule of paired masking in exact arithmetic: [P, N, C] values and masks."""
    points, rows, components = values.shape
    keep = [[all(valid[p, n, c] for p in range(points)) for c in range(components)] for n in range(rows)]
    counts = [any(row) for row in keep]
    totals = [
        sum(
            (
                Fraction(float(sum(float(values[p, n, c]) for c in range(components) if keep[n][c])))
                for n in range(rows)
            ),
            Fraction(0),
        )
        for p in range(points)
    ]
    return [total / max(1, sum(counts)) for total in totals], counts


@settings(derandomize=True, max_examples=100, deadline=None)
@given(data=st.data(), points=st.integers(1, 4), rows=st.integers(1, 6), components=st.integers(1, 3))
def test_masking_is_paired(data: st.DataObject, points: int, rows: int, components: int):
    shape = (points, rows, components)
    count = points * rows * components
    numbers = st.floats(-1e3, 1e3, width=32)
    values = torch.tensor(data.draw(st.lists(numbers, min_size=count, max_size=count))).view(shape)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count))).view(shape)
    garbage = data.draw(st.sampled_from([math.nan, math.inf, -1e30]))
    samples = [Samples(values[p].masked_fill(~valid[p], garbage), valid[p]) for p in range(points)]
    evaluation = Evaluation.of(POINTS[:points], samples, min_valid_fraction=0.0)
    expected, counts = reference_means(values, valid)
    assert evaluation.valid.tolist() == counts
    assert (evaluation.skip_reason is None) == any(counts)
    if any(counts):
        for found, exact in zip(evaluation.means, expected, strict=True):
            assert found == pytest.approx(float(exact), rel=1e-14, abs=1e-11)


def test_a_failure_at_one_point_never_becomes_a_difference():
    """Two points with equal values everywhere: whatever fails where, the difference stays exactly zero."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        values = torch.randn(16, 2, generator=generator)
        masks = [torch.rand(16, 2, generator=generator) > 0.4 for _ in range(2)]
        samples = [Samples(values.masked_fill(~mask, -1e6), mask) for mask in masks]
        plus, minus = Evaluation.of(POINTS[1:3], samples, 0.0).means
        assert plus == minus


def test_means_are_exact_and_do_not_depend_on_the_order():
    values = torch.tensor([1e16, 1.0, -1e16, 1.0], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [2, 1, 3, 0], [1, 3, 0, 2]):
        assert Evaluation.of([Point()], [Samples.of(values[order])], 0.5).means == [0.5]


@pytest.mark.parametrize(
    ("failed", "fraction", "skipped"),
    [(0, 1.0, False), (1, 1.0, True), (2, 0.5, False), (3, 0.5, True), (3, 0.0, False), (4, 0.0, True)],
)
def test_too_few_samples_are_a_reason_to_skip(failed: int, fraction: float, skipped: bool):
    mask = torch.arange(4)[:, None] >= failed
    good = Samples.of(torch.ones(4))
    evaluation = Evaluation.of(POINTS[:2], [good, Samples(good.values, mask)], fraction)
    assert (evaluation.skip_reason is not None) == skipped
    if skipped:
        least = f", fewer than {fraction:.0%}" if fraction else ""
        assert evaluation.skip_reason == f"{4 - failed} of 4 samples have a value at every point{least}"
    assert evaluation.means == ([1.0, 1.0] if failed < 4 else pytest.approx([math.nan, math.nan], nan_ok=True))


@pytest.mark.parametrize(
    ("answers", "fraction", "reason"),
    [
        (0, 0.0, "0 of 500 comparisons have an answer"),
        (1, 0.0, None),
        (1, 0.005, "1 of 500 comparisons have an answer, fewer than 0.5%"),
        (34, 0.07, "34 of 500 comparisons have an answer, fewer than 7%"),
        (35, 0.07, None),
    ],
)
def test_too_few_answers_are_a_reason_to_skip(answers: int, fraction: float, reason: str | None):
    votes = torch.full((1, 500), math.nan, dtype=torch.float64)
    votes[0, :answers] = 1.0
    samples = [Samples.of(torch.zeros(500))] * 2
    evaluation = Evaluation.of(POINTS[:2], samples, fraction, lambda asked: Preferences(votes))
    assert evaluation.compared([(0, 1)]).skip_reason == reason


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_a_reason_to_skip_and_names_the_point(bad: float):
    good, poor = Samples.of(torch.ones(4)), Samples.of(torch.tensor([1.0, bad, 1.0, 1.0]))
    assert Evaluation.of(POINTS[:2], [good, poor], 0.5).skip_reason == "the objective is not finite at point up"
    # ... unless the sample does not count, because it failed elsewhere.
    mask = torch.tensor([[True], [False], [True], [True]])
    assert Evaluation.of(POINTS[:2], [Samples(good.values, mask), poor], 0.5).skip_reason is None


def test_min_valid_fraction_is_checked():
    _, optimizer = make("tied")
    with pytest.raises(ValueError, match=r"min_valid_fraction=1\.5 must be between 0 and 1"):
        Copy(optimizer.space, min_valid_fraction=1.5)


def test_ties_and_identical_completions():
    mask = torch.tensor([[True], [True], [True], [False]])
    first = Samples(torch.tensor([[1.0], [2.0], [3.0], [0.0]]), mask, ("a", "b", "c", "d"))
    second = Samples(torch.tensor([[1.0], [2.5], [3.0], [0.0]]), mask, ("a", "x", "y", "d"))
    evaluation = Evaluation.of(POINTS[:2], [first, second], 0.5)
    assert evaluation.tie_fraction([(0, 1)]) == pytest.approx(2 / 3)
    assert evaluation.tie_fraction([(0, 0), (0, 1)]) == pytest.approx(5 / 6)
    assert evaluation.identical_fraction([(0, 1)]) == 0.5
    assert math.isnan(evaluation.tie_fraction([]))
    silent = Evaluation.of([Point()], [Samples.of(torch.ones(2))], 0.5)
    assert math.isnan(silent.identical_fraction([(0, 0)]))


def test_samples_of_micro_batches_are_those_of_the_batch():
    parts = [
        Samples(torch.full((n, 2), float(n)), torch.ones(n, 2).bool(), ("t",) * n, {"f1": torch.zeros(n)})
        for n in (2, 3)
    ]
    whole = Samples.concatenate(parts)
    assert whole.values.shape == (5, 2)
    assert whole.values[:, 0].tolist() == [2, 2, 3, 3, 3]
    assert whole.completions == ("t",) * 5
    assert whole.metrics["f1"].shape == (5,)
    assert Samples.concatenate(parts[:1]) is parts[0]


class UsesWeightElsewhere(nn.Module):
    """A head that multiplies with the embedding's weight itself, without calling the module that holds it."""

    def __init__(self, transposed: bool):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.transposed = transposed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.embed.weight.dtype == torch.float32  # asking is no use
        hidden = self.embed(ids).mean(1)
        weight = self.embed.weight
        return hidden @ weight.T if self.transposed else nn.functional.linear(hidden, weight)


@pytest.mark.parametrize("transposed", [False, True])
def test_leaf_scratch_refuses_a_weight_that_is_used_outside_of_its_module(transposed: bool) -> None:
    model = UsesWeightElsewhere(transposed)
    ids = torch.arange(6).view(2, 3)
    optimizer = MeZO(model.named_parameters())
    points = [Point(((1, 0.1),))]
    with pytest.raises(ValueError, match=r"embed\.weight.*outside.*evaluator: copy"):
        LeafScratch(model, optimizer.space)(lambda: model(ids).sum())(points)
    assert Copy(optimizer.space)(lambda: model(ids).sum())(points).skip_reason is None
