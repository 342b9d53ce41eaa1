"""Steps made on a GPU: no trace, the same values by either evaluator, replay on the CPU, and little memory."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conformance
import pytest
import torch
import torch.nn.functional as F
from gpu_helpers import DEVICE, DTYPES, KINDS, NEEDS_CUDA, assert_same_states, same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedModel

from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy, Evaluator, Samples
from mezo_lightning.generation import KeyedGumbel
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rounding import RoundingName
from mezo_lightning.samplers import derive_seed
from mezo_lightning.steps import Point
from mezo_lightning.trajectory import Header, Trajectory, replay

pytestmark = NEEDS_CUDA

ARCHITECTURES = ["opt", "gpt2", "llama"]
HALVES = DTYPES[1:]
POINTS = [Point(), Point(((1, 1e-2),)), Point(((1, -1e-2),)), Point(), Point(((2, 1e-3), (3, -2e-2)))]


def losses(model: PreTrainedModel, rows: int = 4, tokens: int = 24) -> Callable[[], Tensor]:
    """The loss of each of some random rows."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (rows, tokens), generator=generator).to(model.device)

    def objective() -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(rows, -1).mean(1)

    return objective


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not same(one[name], other[name])]


@pytest.mark.parametrize("combination", conformance.with_every_part(), ids=str)
def test_every_part_moves_the_weights_to_the_same_bits_as_on_the_cpu(combination: conformance.Combination):
    here, there = conformance.Run(combination), conformance.Run(combination, device=DEVICE)
    for _ in range(4):
        before = there.weights()
        there.estimate()
        assert conformance.same_bits(there.weights(), before), "evaluating left a trace"
        estimate = here.estimate()
        for run in (here, there):
            run.optimizer.step(estimate=estimate)
        assert conformance.same_bits([tensor.cpu() for tensor in there.weights()], here.weights())
    here.load(there.saved())  # with all that optimizer and update remember
    for run in (here, there):
        run.optimizer.step(estimate=estimate)
    assert conformance.same_bits([tensor.cpu() for tensor in there.weights()], here.weights())


def make_evaluator(kind: type[Evaluator], model: nn.Module, optimizer: MeZO) -> Evaluator:
    return LeafScratch(model, optimizer.space) if kind is LeafScratch else Copy(optimizer.space)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_both_evaluators_give_the_same_values_and_leave_no_trace(
    architecture: str, dtype: torch.dtype, make_model: Any
):
    model = make_model(architecture).to(DEVICE, dtype)
    optimizer, before = MeZO(model.named_parameters()), snapshot(model)
    found = []
    lockstep = LeafScratch(model, optimizer.space, lockstep=True)
    for evaluator in (Copy(optimizer.space), LeafScratch(model, optimizer.space), lockstep):
        evaluation = evaluator(losses(model))(POINTS)
        assert_same_weights(snapshot(model), before)
        found.append(evaluation.values)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0][0], found[0][3])
    assert not torch.equal(found[0][0], found[0][1])


class RewardFailedError(Exception):
    pass


class Flaky:
    """An objective of which some samples fail, all fail at times, and which raises at others."""

    def __init__(self, objective: Callable[[], Tensor]):
        self.objective, self.calls = objective, 0

    def __call__(self) -> Samples:
        self.calls += 1
        if self.calls % 7 == 0:
            raise RewardFailedError
        values = self.objective()[:, None]
        generator = torch.Generator().manual_seed(self.calls)
        valid = torch.rand(values.shape, generator=generator) > (0.95 if self.calls % 5 == 0 else 0.2)
        return Samples(values.masked_fill(~valid.to(values.device), torch.nan), valid.to(values.device))


@pytest.mark.parametrize("kind", [Copy, LeafScratch])
@pytest.mark.parametrize("dtype", HALVES)
def test_steps_at_lr_0_with_a_failing_objective_leave_every_byte(
    kind: type[Evaluator], dtype: torch.dtype, make_model: Any
):
    model = make_model("opt").to(DEVICE, dtype)
    for parameter in model.parameters():
        parameter.data.view(-1)[0] = -0.0
    before = snapshot(model)
    optimizer = MeZO(model.named_parameters(), lr=0.0, weight_decay=0.1)
    evaluator, objective = make_evaluator(kind, model, optimizer), Flaky(losses(model))
    raised, skipped, made = 0, 0, 0
    for step in range(100):
        try:
            estimate = CentralDifference(1e-2).estimate(evaluator(objective), seed=step)
        except RewardFailedError:
            raised += 1
            continue
        skipped += estimate.skipped is not None
        made += any(estimate.projected_grads)
        optimizer.step(estimate=estimate)
    assert raised > 10
    assert skipped > 10
    assert made > 10
    assert_same_weights(snapshot(model), before)


def run(model: PreTrainedModel, rounding: RoundingName, path: Path) -> MeZO:
    """A few recorded steps, large enough to move every kind of weight."""
    optimizer = MeZO(model.named_parameters(), lr=1e-3, weight_decay=0.1, rounding=rounding)
    optimizer.trajectory = Trajectory.create(path, Header.of(optimizer.space))
    evaluator, objective = LeafScratch(model, optimizer.space), losses(model)
    for step in range(6):
        optimizer.step(estimate=CentralDifference(1e-2, 2).estimate(evaluator(objective), seed=derive_seed(5, step)))
    optimizer.trajectory.close()
    return optimizer


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
@pytest.mark.parametrize("direction", ["gpu to cpu", "cpu to gpu"])
def test_a_run_is_replayed_on_the_other_device_to_the_same_bytes(
    direction: str, dtype: torch.dtype, rounding: RoundingName, make_model: Any, tmp_path: Path
):
    places = (DEVICE, torch.device("cpu"))
    ran_on, replayed_on = places if direction == "gpu to cpu" else places[::-1]
    model = make_model("opt").to(ran_on, dtype)
    base = snapshot(model)
    optimizer = run(model, rounding, tmp_path / "trajectory.bin")
    assert any(not same(base[name], value) for name, value in model.state_dict().items())
    other = make_model("opt").to(replayed_on, dtype)
    with Trajectory.open(tmp_path / "trajectory.bin") as trajectory:
        assert len(trajectory) == 6
        space = replay(other, trajectory)
    assert_same_weights(snapshot(other), snapshot(model))
    assert space.fingerprint() == optimizer.space.fingerprint()
    for one, two in zip(space.stores, optimizer.space.stores, strict=True):
        assert_same_states(one, two)


def test_keyed_gumbel_draws_the_same_tokens():
    """The hash has the same bits; the logarithms may differ in the last bit of fp64, which decides no draw."""
    generator = torch.Generator().manual_seed(0)
    index = [0, 1, 2, 77, 1 << 40]
    for position in range(40):
        scores = torch.randn(len(index), 5003, generator=generator) * 3
        noisy = []
        for device in (torch.device("cpu"), DEVICE):
            ids = torch.zeros(len(index), 9 + position, dtype=torch.int64, device=device)
            noisy.append(KeyedGumbel(3, index, width=9)(ids, scores.to(device)).cpu())
        assert torch.equal(noisy[0].argmax(-1), noisy[1].argmax(-1)), position
        torch.testing.assert_close(noisy[0], noisy[1], rtol=1e-12, atol=1e-12)


def peak_memory(action: Callable[[], object]) -> int:
    """Bytes allocated at the most while something runs, with all that was allocated before."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    action()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


SHAPE_OF_OPT_1_3B = {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
                     "num_attention_heads": 32}  # fmt: skip


@pytest.mark.slow
def test_a_step_takes_hardly_more_memory_than_a_forward():
    """OPT-1.3B's shape in bf16, 8 x 128 tokens. What a step needs more does not grow with the layers."""
    torch.manual_seed(0)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(OPTConfig(**SHAPE_OF_OPT_1_3B), dtype=torch.bfloat16).eval()
    objective = losses(model, rows=8, tokens=128)
    with torch.inference_mode():
        objective()  # what libraries allocate at first use is in both figures
        forward = peak_memory(objective)
    optimizer = MeZO(model.named_parameters(), lr=1e-6)
    evaluator = LeafScratch(model, optimizer.space)

    def step() -> None:
        optimizer.step(estimate=CentralDifference(1e-3).estimate(evaluator(objective), seed=1))

    assert peak_memory(step) <= 1.15 * forward
