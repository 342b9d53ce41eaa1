"""Ctrl-C at any moment, by real signals, leaves weights whole: before an update or after it, and unperturbed."""

import contextlib
import copy
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning import evaluators, interrupts, optimizer
from mezo_lightning.evaluators import Copy, Evaluator
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.samplers import Gaussian
from mezo_lightning.steps import GradientEstimate, Point
from mezo_lightning.trajectory import Header, Trajectory

POINTS = [Point(((1, 1e-2),))]


@pytest.fixture(autouse=True)
def _the_usual_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_for_the_end_of_the_outermost_block():
    done = []

    def work() -> None:
        with uninterrupted():
            with uninterrupted():
                signal.raise_signal(signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_users_code_in_the_block_is_interrupted_at_once_and_the_rest_is_not():
    done = []

    def work(where: str) -> None:
        with uninterrupted() as interruptible:
            with interruptible:
                if where == "users":
                    signal.raise_signal(signal.SIGINT)
                done.append("users")
            if where == "ours":
                signal.raise_signal(signal.SIGINT)
            done.append("ours")

    with pytest.raises(KeyboardInterrupt):
        work("users")
    assert done == []
    with pytest.raises(KeyboardInterrupt):
        work("ours")
    assert done == ["users", "ours"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_sigterm_goes_to_its_handler_afterwards():
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    with uninterrupted():
        signal.raise_signal(signal.SIGTERM)
        assert got == []
    assert got == [signal.SIGTERM]


def test_an_interrupt_while_handlers_are_put_back_keeps_none_of_ours():
    def on_term(number: int, frame: FrameType | None) -> None: ...

    def work() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, on_term)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGTERM) is on_term


def test_the_blocks_own_exception_is_not_lost():
    with pytest.raises(ValueError, match="mine"), uninterrupted():
        raise ValueError("mine")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_have_nothing_to_hold_back():
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with uninterrupted() as interruptible, interruptible:
                pass
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


# -- a signal at every single instruction ------------------------------------------------------------------------------

TRACED = {module.__file__ for module in (evaluators, interrupts, optimizer)} | {contextlib.__file__}


class InterruptAt:
    """Raises SIGINT just before the n-th instruction that is executed in evaluators, interrupts or the optimizer."""

    def __init__(self, number: int):
        self.left = number

    def __call__(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self.count

    def count(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            self.left -= 1
            if self.left == 0:
                signal.raise_signal(signal.SIGINT)
        return self.count


def interrupted_runs(run: Callable[[], Any], stride: int) -> Iterator[bool]:
    """Run with an interrupt at every stride-th instruction; yields whether it was felt, until a run has no more."""
    number, previous = 1, sys.gettrace()
    while True:
        tracer, felt = InterruptAt(number), False
        sys.settrace(tracer)
        try:
            run()
        except KeyboardInterrupt:
            felt = True
        finally:
            sys.settrace(previous)
        yield felt
        if tracer.left > 0:
            return
        number += stride


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.scale, self.head = nn.Embedding(4, 3), nn.Parameter(torch.ones(3)), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids) * self.scale)


@pytest.mark.parametrize("kind", [Copy, LeafScratch])
def test_an_interrupt_at_any_instruction_of_an_evaluation(kind: type[Evaluator]):
    model, ids = Small().to(torch.bfloat16), torch.arange(4)
    space = MeZO(model.named_parameters()).space
    evaluator = Copy(space) if kind is Copy else LeafScratch(model, space)
    evaluate = evaluator(lambda: model(ids).float().mean(-1))
    expected, before = evaluate(POINTS).values, copy.deepcopy(model.state_dict())
    felt = 0
    for interrupted in interrupted_runs(lambda: evaluate(POINTS), stride=1):
        felt += interrupted
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert felt > 200
    assert torch.equal(evaluate(POINTS).values, expected)


def test_an_interrupt_at_any_instruction_of_an_update(tmp_path: Path):
    """The weights are those before or those after, and the log says which."""
    estimate = GradientEstimate((5, 6), (1.0, -2.0))

    def start(path: Path) -> tuple[nn.Module, MeZO]:
        torch.manual_seed(0)
        model = Small().to(torch.bfloat16)
        mezo = MeZO(model.named_parameters(), lr=1e-2, weight_decay=0.1)
        mezo.trajectory = Trajectory.create(path, Header.of(mezo.space))
        return model, mezo

    model, mezo = start(tmp_path / "reference")
    states = [copy.deepcopy(model.state_dict())]
    mezo.step(estimate=estimate)
    states.append(copy.deepcopy(model.state_dict()))
    assert mezo.trajectory is not None
    mezo.trajectory.close()
    model, mezo = start(tmp_path / "interrupted")
    assert mezo.trajectory is not None
    felt: list[int] = []
    for _ in interrupted_runs(lambda: mezo.step(estimate=estimate), stride=3):
        steps = len(mezo.trajectory)
        assert all(torch.equal(value, states[steps][name]) for name, value in model.state_dict().items())
        felt.append(steps)
        mezo.trajectory.truncate(0)
        model.load_state_dict(states[0])
    mezo.trajectory.close()
    assert set(felt) == {0, 1}


class InterruptingGaussian(Gaussian):
    """Sends SIGINT as the second chunk's noise is made: the first one is written, the second is not."""

    calls: ClassVar[int] = 0

    def fill(self, out: Tensor, seed: int, start: int, number: int = 0) -> Tensor:
        type(self).calls += 1
        if self.calls == 2:
            signal.raise_signal(signal.SIGINT)
        return super().fill(out, seed, start, number)


class InterruptedSpace(ParameterSpace):
    """Sends SIGINT when a part of the weights is restored."""

    def restore(self, saved: Sequence[Tensor]) -> None:
        self.slices[0].weights.copy_(saved[0])
        signal.raise_signal(signal.SIGINT)
        super().restore(saved)


def two_large_parameters() -> list[tuple[str, Tensor]]:
    return [(name, torch.full((700_000,), 1.0, dtype=torch.bfloat16)) for name in "ab"]


def test_ctrl_c_in_the_middle_of_an_update_waits_for_its_end():
    named = [(name, nn.Parameter(weights)) for name, weights in two_large_parameters()]
    mezo = MeZO(named, lr=1.0, sampler=InterruptingGaussian())
    with pytest.raises(KeyboardInterrupt):
        mezo.step(estimate=GradientEstimate((1,), (1.0,)))
    assert InterruptingGaussian.calls == 3
    assert all((parameter.data != 1.0).float().mean() > 0.9 for _, parameter in named)


def test_ctrl_c_in_the_middle_of_restoring_waits_for_its_end():
    named = two_large_parameters()
    space = InterruptedSpace.of(named, [0, 0], Gaussian(), "stochastic")
    with pytest.raises(KeyboardInterrupt):
        Copy(space)(lambda: named[0][1].sum())(POINTS)
    assert all(bool((weights == 1.0).all()) for _, weights in named)
