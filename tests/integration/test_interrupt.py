"""Ctrl-C at random moments of a run, and at the worst ones: what is saved is a state that the trajectory has."""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from helpers import (
    Watch,
    assert_same,
    data_of,
    module_of,
    parse_docstrings_once,
    replayed,
    steps_of,
    steps_taken,
    trainer_of,
    weights,
)
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mezo_lightning import MeZOModule, evaluators
from mezo_lightning.callbacks import RunRecorder
from mezo_lightning.cli import main
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.trajectory import Trajectory

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

RUNS = 5


def run_one_after_another(jobs: list[tuple[int, list[str]]]) -> None:
    """Run commands, and say when each has made so many steps, and how it ended."""
    torch.set_num_threads(1)
    parse_docstrings_once()
    write = RunRecorder.on_train_batch_end

    def noisy(self: Any, trainer: Any, *rest: Any) -> None:
        write(self, trainer, *rest)
        if trainer.global_step == step:
            print("running", file=sys.stderr, flush=True)

    RunRecorder.on_train_batch_end = noisy
    for step, words in jobs:  # noqa: B007, the step is read above
        signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning leaves it ignored
        try:
            main(words)
            code = "none"
        except SystemExit as stop:
            code = stop.code
        print("code", code, file=sys.stderr, flush=True)


def consistent(run: Path, model: Path) -> int:
    """Check that the last checkpoint holds what its steps of the trajectory give; the number of steps."""
    path = max(run.glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    checkpoint = torch.load(path, weights_only=True)
    module = MeZOModule.load_from_checkpoint(path)
    assert module.model is not None
    assert_same(weights(module.model), weights(replayed(run, model, stop=checkpoint["global_step"])))
    return checkpoint["global_step"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["loss", "reward"])
def test_ctrl_c_at_random_moments(kind: str, request: pytest.FixtureRequest, tmp_path: Path, opt: Path):
    config = request.getfixturevalue(f"{kind}_config")
    jobs = [
        [n + 1, ["fit", "--config", str(config), "--run_dir", str(tmp_path / str(n)), "--trainer.max_steps", "100000",
         "--checkpoint.save_on_exception", "true", "--trainer.limit_val_batches", "0",
         "--model.optimizer.init_args.weight_decay", "0.1"]]
        for n in range(RUNS)
    ]  # fmt: skip
    chance, lines, codes = random.Random(7), [], []
    os.mkfifo(tmp_path / "stderr")
    with forks.cleared() as processes:
        child = forks.start(run_one_after_another, jobs, folder=Path(__file__).parent, log=tmp_path / "stderr")
        processes.append(child)
        with (tmp_path / "stderr").open() as stderr:
            for line in stderr:
                lines.append(line)
                if line == "running\n":
                    time.sleep(chance.uniform(0.0, 0.05))  # somewhere within a step
                    forks.send(child, signal.SIGINT)
                elif line.startswith("code"):
                    codes.append(line.split()[1])
        assert forks.ended(child) == 0, "".join(lines)
    assert codes == ["1"] * RUNS
    assert "Traceback" not in "".join(lines)
    counts = [consistent(tmp_path / str(n), opt) for n in range(RUNS)]
    assert len(set(counts)) > 1
    for n, count in enumerate(counts):
        assert count == len(steps_taken(tmp_path / str(n)))
        info = RunRecords(tmp_path / str(n)).info()
        assert info is not None
        assert (info.status, info.steps) == ("interrupted", count)
        assert "Stopped by hand" in (tmp_path / str(n) / "report.html").read_text()


# -- in this process, at chosen moments --------------------------------------------------------------------------------


class InterruptBeforeTheUpdate(Callback):
    """The signal comes while Lightning is about to step: it is held back until all that belongs together is done."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)


def fit(folder: Path, opt: Path, rows: Path, steps: int, *callbacks: Callback, ckpt: str | None = None) -> Watch:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    watch = Watch()
    saver = ModelCheckpoint(folder / "checkpoints", "{step}", every_n_train_steps=100, save_on_exception=True)
    trainer = trainer_of(folder, steps, callbacks=[watch, saver, *callbacks], enable_checkpointing=True)
    trainer.fit(module_of(opt, lr_scheduler=schedule), data_of(rows), ckpt_path=ckpt, weights_only=True)
    return watch


@pytest.fixture
def ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("ctrl_c")
def test_the_schedule_goes_with_the_step_that_was_interrupted(tmp_path: Path, opt: Path, rows: Path):
    whole = fit(tmp_path / "whole", opt, rows, 5)
    with pytest.raises(SystemExit):
        fit(tmp_path / "run", opt, rows, 5, InterruptBeforeTheUpdate())
    assert consistent(tmp_path / "run", opt) == 3  # the update was made, and counted
    rest = fit(tmp_path / "run", opt, rows, 5, ckpt=str(tmp_path / "run/checkpoints/step=3.ckpt"))
    assert [record.lr for record in rest.records] == [record.lr for record in whole.records[3:]]
    assert len(steps_taken(tmp_path / "run")) == 5


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("place", ["objective", "append"])
def test_an_interrupt_within_a_step_leaves_whole_weights(
    place: str, tmp_path: Path, opt: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
):
    """In the middle of a probe, when weights are perturbed, and between the update and its record."""
    calls = 0

    def interrupting(function: Any, at: int) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                signal.raise_signal(signal.SIGINT)
            return function(*arguments, **named)

        return wrapped

    if place == "objective":  # two probes a step: the second one of the third step
        monkeypatch.setattr(evaluators.Samples, "concatenate", interrupting(evaluators.Samples.concatenate, 6))
    else:
        monkeypatch.setattr(Trajectory, "append", interrupting(Trajectory.append, 3))
    with pytest.raises(SystemExit):
        fit(tmp_path, opt, rows, 5)
    expected = 2 if place == "objective" else 3
    assert consistent(tmp_path, opt) == expected
    assert len(steps_taken(tmp_path)) == expected
    assert not steps_of(tmp_path)  # no recorder here
