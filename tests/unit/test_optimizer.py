"""MeZO as an ordinary optimizer: groups, decay by kind, schedulers, state, and models of every sort."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from mezo_lightning.dense import DenseMomentum
from mezo_lightning.estimators import CentralDifference
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rounding import RoundingName
from mezo_lightning.samplers import Gaussian
from mezo_lightning.steps import GradientEstimate, round_coefficient, round_fp32
from mezo_lightning.updates import Momentum, Update

ESTIMATE = GradientEstimate((5, 6), (1.0, -2.0), 0.5)
ROUNDINGS: list[RoundingName] = ["stochastic", "compensated", "master"]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 5), nn.LayerNorm(5), nn.Linear(5, 4))


def moved_by_hand(model: nn.Module, estimate: GradientEstimate, lr: float, decayed: Callable[[Tensor], float]) -> None:
    start, decaying = 0, any(map(decayed, model.parameters()))
    for parameter in model.parameters():
        pull = (parameter.data.double() * -round_fp32(lr * decayed(parameter))).float().double()
        value = pull if decaying else parameter.data.double()
        for seed, g in zip(estimate.seeds, estimate.projected_grads, strict=True):
            z = Gaussian().fill(torch.empty(parameter.numel()), seed, start).view(parameter.shape).double()
            value = (value + round_coefficient(-lr * estimate.scale * g) * z).float().double()
        parameter.data = (parameter.data.double() + value if decaying else value).float()
        start += parameter.numel()


def assert_equal(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x.data.view(torch.uint8), y.data.view(torch.uint8)), name


def test_a_step_is_the_formula_with_decay_of_matrices_only():
    model, other = make_model(), make_model()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, weight_decay=0.5)
    optimizer.step(estimate=ESTIMATE)
    moved_by_hand(other, ESTIMATE, 1e-2, lambda parameter: 0.5 if parameter.dim() >= 2 else 0.0)
    assert_equal(model, other)


def test_positions_do_not_depend_on_the_groups():
    """Weight decay splits the groups; groups in a file may come in another order than the parameters."""
    model, other, third = make_model(), make_model(), make_model()
    MeZO(model.named_parameters(), lr=1e-2).step(estimate=ESTIMATE)
    MeZO(other.named_parameters(), lr=1e-2, weight_decay=1e-50).step(estimate=ESTIMATE)
    assert_equal(model, other)
    named = list(third.named_parameters())
    optimizer = MeZO([{"params": named[:2]}, {"params": named[2:], "lr": 1e-2}], lr=1e-2)
    optimizer.step(estimate=ESTIMATE)
    assert_equal(model, third)
    assert [info.group for info in optimizer.space.table] == [0, 0, 1, 1, 1]


def test_groups_have_rates_and_decays_of_their_own():
    model = make_model()
    before = [parameter.data.clone() for parameter in model.parameters()]
    named = list(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": named[:1], "lr": 0.0, "weight_decay": 0.5},
        {"params": named[1:3], "lr": 1e-2, "weight_decay": 0.5},
        {"params": named[3:], "lr": 2e-2},
    ]
    optimizer = MeZO(groups, lr=1.0, weight_decay=0.25)
    step = optimizer._make_step(optimizer.memory, ESTIMATE)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.0, 1e-2, 2e-2, 2e-2]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.5, 0.25, 0.0]
    assert step.decays == tuple(map(round_fp32, (0.0, 5e-3, 5e-3, 0.0)))
    assert step.terms[1][1] == tuple(round_coefficient(lr) for lr in rates)
    optimizer.step(estimate=ESTIMATE)
    after = [parameter.data for parameter in model.parameters()]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, False, False, False]


@pytest.mark.parametrize("make", ["lambda", "cosine"])
def test_schedulers_set_the_rate(make: str):
    model, other = make_model(), make_model()
    optimizer = MeZO(model.named_parameters(), lr=1e-2)
    scheduler = (
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        if make == "lambda"
        else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
    )
    rates = []
    for _ in range(4):
        lr = float(scheduler.get_last_lr()[0])
        rates.append(lr)
        optimizer.step(estimate=ESTIMATE)
        moved_by_hand(other, ESTIMATE, lr, lambda parameter: 0.0)
        scheduler.step()
    assert len(set(rates)) == 4
    assert_equal(model, other)


def test_an_empty_estimate_is_a_step_that_changes_nothing():
    model, other = make_model(), make_model()
    optimizer = MeZO(model.named_parameters(), lr=1e-2, weight_decay=0.5)
    optimizer.step(estimate=GradientEstimate(skipped="all samples failed"))
    assert_equal(model, other)


def test_the_closure_is_called_once_before_the_update():
    model = make_model()
    optimizer = MeZO(model.named_parameters(), lr=1e-2)
    weight = model.get_parameter("2.weight")
    before = weight.data.clone()
    seen: list[bool] = []
    assert optimizer.step(lambda: seen.append(torch.equal(weight.data, before)) or 7, estimate=ESTIMATE) == 7
    assert seen == [True]


def test_a_step_without_an_estimate_is_refused():
    with pytest.raises(ValueError, match=r"needs estimate=\.\.\., made by an estimator"):
        MeZO(make_model().parameters()).step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, r"lr=-1\.0 must not be negative"),
        ({"lr": float("nan")}, "lr=nan must not be negative"),
        ({"weight_decay": -0.1}, r"weight_decay=-0\.1 must not be negative"),
        ({"rounding": "nearest"}, "rounding='nearest' is unknown"),
    ],
)
def test_wrong_options_are_refused_by_name(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        MeZO(make_model().named_parameters(), **options)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter: requires_grad is False"):
        MeZO(make_model().requires_grad_(False).named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_state_goes_through_a_file_and_the_run_continues_with_the_same_bits(dtype: torch.dtype, rounding: RoundingName):
    def start() -> tuple[nn.Module, MeZO, torch.optim.lr_scheduler.LambdaLR]:
        model = make_model().to(dtype)
        optimizer = MeZO(model.named_parameters(), lr=1e-4, weight_decay=0.1, rounding=rounding)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def run(optimizer: MeZO, scheduler: torch.optim.lr_scheduler.LambdaLR, steps: range) -> None:
        for step in steps:
            optimizer.step(estimate=GradientEstimate((step, 99 + step), (1.0, -2.0)))
            scheduler.step()

    model, optimizer, scheduler = start()
    run(optimizer, scheduler, range(5))
    file = io.BytesIO()
    torch.save({"m": model.state_dict(), "o": optimizer.state_dict(), "s": scheduler.state_dict()}, file)
    run(optimizer, scheduler, range(5, 10))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, second, third = start()
    resumed.load_state_dict(saved["m"])
    second.load_state_dict(saved["o"])
    third.load_state_dict(saved["s"])
    assert second.param_groups[0]["lr"] == pytest.approx(1e-4 * 0.9**5)
    run(second, third, range(5, 10))
    assert_equal(model, resumed)
    for a, b in zip(optimizer.space.stores, second.space.stores, strict=True):
        assert (a.state is None) == (b.state is None)
        assert a.state is None or b.state is None or torch.equal(a.state, b.state)


def test_state_of_another_rounding_is_refused():
    state = MeZO(make_model().bfloat16().parameters(), rounding="master").state_dict()
    with pytest.raises(ValueError, match="saved with rounding='master', this optimizer has rounding='stochastic'"):
        MeZO(make_model().bfloat16().parameters()).load_state_dict(state)


def test_frozen_and_tied_parameters_have_no_positions():
    model = nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 3), "c": nn.Linear(3, 4, bias=False)})
    model["c"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    space = MeZO(model.named_parameters(), weight_decay=0.1).space
    assert [(info.name, info.start) for info in space.table] == [("a.weight", 0), ("a.bias", 12), ("b.weight", 16)]


def test_parameters_may_come_without_names():
    model, other = make_model(), make_model()
    optimizer = MeZO(model.parameters(), lr=1e-2)
    optimizer.step(estimate=ESTIMATE)
    MeZO(other.named_parameters(), lr=1e-2).step(estimate=ESTIMATE)
    assert_equal(model, other)
    assert [info.name for info in optimizer.space.table] == ["0", "1", "2", "3", "4"]


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # between peft and transformers
def test_a_peft_wrapped_model_tunes_its_adapters_only():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=20, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=8
    )
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(OPTForCausalLM(config), lora).eval()
    optimizer = MeZO(model.named_parameters(), lr=1e-2)
    assert optimizer.space.numel == 2 * 2 * (2 * 8)
    assert all("lora_" in info.name for info in optimizer.space.table)
    ids = torch.arange(16).view(2, 8)
    frozen = {name: p.data.clone() for name, p in model.named_parameters() if not p.requires_grad}

    def objective() -> Tensor:
        logits = model(ids).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)

    evaluator = LeafScratch(model, optimizer.space)
    estimate = CentralDifference(1e-2).estimate(evaluator(objective), seed=1)
    optimizer.step(estimate=estimate)
    estimate = CentralDifference(1e-2).estimate(evaluator(objective), seed=2)
    assert estimate.projected_grads != (0.0,)
    assert all(torch.equal(p.data, frozen[name]) for name, p in model.named_parameters() if not p.requires_grad)


def test_an_lstm_learns_with_the_bare_optimizer():
    """Which of two symbols came last in a sequence."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.lstm, self.head = nn.Embedding(2, 4), nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.lstm(self.embed(ids))[0][:, -1])

    model = Net()
    ids = torch.randint(2, (64, 3), generator=torch.Generator().manual_seed(0))
    optimizer = MeZO(model.named_parameters(), lr=1e-1)
    evaluator = LeafScratch(model, optimizer.space)

    def objective() -> Tensor:
        return F.cross_entropy(model(ids), ids[:, -1], reduction="none")

    with torch.no_grad():
        before = float(objective().mean())
    for step in range(150):
        estimate = CentralDifference(1e-3, num_queries=2).estimate(evaluator(objective), seed=step)
        optimizer.step(estimate=estimate)
    with torch.no_grad():
        after = float(objective().mean())
    assert before > 0.6
    assert after < 0.2


def test_a_later_parameter_group_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = MeZO([("weight", model.weight)])
    with pytest.raises(ValueError, match="another parameter group"):
        optimizer.add_param_group({"params": [("bias", model.bias)]})


@pytest.mark.parametrize("update", [None, Momentum(0.5, window=2), DenseMomentum(0.5)], ids=repr)
def test_the_size_of_a_step_is_told(update: Update | None):
    """From its coefficients alone, as far as those tell it: two groups of other sizes and rates."""
    weights = [("matrix", nn.Parameter(torch.zeros(200, 150))), ("bias", nn.Parameter(torch.zeros(10_000)))]
    optimizer = MeZO([{"params": [weights[0]], "lr": 0.5}, {"params": [weights[1]], "lr": 2.0}], update=update)
    assert optimizer.update_rms in (0.0, None)
    for step in range(3):
        before = torch.cat([p.detach().flatten() for _, p in weights])
        optimizer.step(estimate=GradientEstimate((2 * step + 1, 2 * step + 2), (3.0, -1.0), 0.5))
        change = torch.cat([p.detach().flatten() for _, p in weights]) - before
        measured = float(change.square().mean().sqrt())
        assert optimizer.update_rms == (
            None if isinstance(update, DenseMomentum) else pytest.approx(measured, rel=0.03)
        )
    optimizer.step(estimate=GradientEstimate(skipped="a tie"))
    assert optimizer.update_rms == (None if isinstance(update, DenseMomentum) else 0.0)
