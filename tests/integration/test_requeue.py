"""A signal at the worst moment of a run: the requeued job goes on as if nothing had happened."""

import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from helpers import (
    assert_same,
    data_of,
    module_of,
    parse_docstrings_once,
    replayed,
    steps_taken,
    trainer_of,
    weights,
    write_config,
)

from mezo_lightning import MeZOModule, evaluators
from mezo_lightning.processes.ranks import Alone
from mezo_lightning.processes.requeue import SignalsBetweenSteps
from mezo_lightning.trajectory import Trajectory

ONE_TASK = {
    "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "tune",
}  # fmt: skip


def fake_scontrol(folder: Path, then: str = "") -> str:
    """A folder for PATH in which `scontrol` writes its arguments down, and does something more."""
    folder.mkdir()
    script = folder / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> "{folder}/log"\n{then}\n')
    script.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


# -- in this process, at chosen moments --------------------------------------------------------------------------------


def signalling(function: Any, at: int) -> Any:
    """The function, with SLURM's signal in the middle of one of its calls."""
    calls = 0

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            signal.raise_signal(signal.SIGUSR1)
        return function(*arguments, **named)

    return wrapped


def fit(folder: Path, opt: Path, rows: Path) -> MeZOModule:
    module = module_of(opt, evaluator="copy")  # whose probes change the weights themselves
    callback = SignalsBetweenSteps(lambda: Alone())
    trainer_of(folder, 5, callbacks=[callback]).fit(module, data_of(rows))
    return module


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One task of a SLURM job; the file in which `scontrol` keeps a log."""
    for name, value in ONE_TASK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", fake_scontrol(tmp_path / "bin"))
    return tmp_path / "bin/log"


@pytest.mark.parametrize("place", ["probe", "update"])
def test_a_checkpoint_is_saved_when_the_step_is_done(
    place: str, tmp_path: Path, opt: Path, rows: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
):
    if place == "probe":  # two a step: the second one of the third step
        monkeypatch.setattr(evaluators.Samples, "concatenate", signalling(evaluators.Samples.concatenate, 6))
    else:
        monkeypatch.setattr(Trajectory, "append", signalling(Trajectory.append, 3))
    fit(tmp_path / "run", opt, rows)
    assert slurm.read_text() == "requeue 4711\n"
    path = tmp_path / "run/hpc_ckpt_1.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 3
    saved = MeZOModule.load_from_checkpoint(path).model
    assert saved is not None
    assert_same(weights(saved), weights(replayed(tmp_path / "run", opt, stop=3)))
    assert len(steps_taken(tmp_path / "run")) == 5  # SLURM ends the job; it may go on until then


def test_a_handler_of_the_users_own_is_left_alone(
    tmp_path: Path, opt: Path, rows: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    monkeypatch.setattr(Trajectory, "append", signalling(Trajectory.append, 3))
    try:
        fit(tmp_path / "run", opt, rows)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]
    assert not slurm.exists()
    assert not (tmp_path / "run/hpc_ckpt_1.ckpt").exists()


# -- as SLURM starts it ------------------------------------------------------------------------------------------------

REWARD = """
import os, pathlib, signal
from mezo_lightning import CentralDifference

calls = 0
original = CentralDifference.estimate

def estimate(self, evaluate, *, seed):
    "Sends a signal to this process in the middle of the third step, in the first of the runs in a folder."
    global calls
    calls += 1
    mark = pathlib.Path("asked")

    def evaluate_and_signal(points):
        evaluation = evaluate(points)
        if calls == 3 and os.environ["SLURM_PROCID"] == os.environ["TO"] and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.Signals[os.environ["SIGNAL"]])
        return evaluation

    return original(self, evaluate_and_signal, seed=seed)

CentralDifference.estimate = estimate

def reward(prompts, completions, **columns):
    return [len(set(text)) + len(text) / 10 for text in completions]
"""
Run = Callable[..., list[str]]


def fit_as_task(folder: str, *words: str) -> None:
    """The command `mezo`, which finds modules in a folder."""
    sys.path.insert(0, folder)
    parse_docstrings_once()
    forks.python("-m", "mezo_lightning", *words)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, opt: Path, rows: Path) -> Run:
    """Starts `mezo fit` as a SLURM job does, once for each task, and waits for its end; what the tasks wrote."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "asking.py").write_text(REWARD)
    completer = {"class_path": "Generate", "init_args": {"max_new_tokens": 6}}
    objective = {"reward": "asking.reward", "completer": completer}
    config = write_config(folder / "config.yaml", opt, rows, {"class_path": "RewardObjective", "init_args": objective})
    # What SLURM does to a job that is requeued; $PPID is rank zero.
    path = fake_scontrol(folder / "bin", "kill -TERM $PPID")

    def run(run_dir: Path, *words: str, tasks: int = 1, asked: int = -1, by: str = "SIGUSR1") -> list[str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run_dir.mkdir(exist_ok=True)
        logs = [run_dir / f"task{task}.log" for task in range(tasks)]
        with forks.cleared() as processes:
            for task, log in enumerate(logs):
                environment = {
                    **ONE_TASK, "SLURM_NTASKS": str(tasks), "SLURM_NTASKS_PER_NODE": str(tasks),
                    "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "MASTER_ADDR": "127.0.0.1", "PATH": path,
                    "MASTER_PORT": str(port), "TO": str(asked), "SIGNAL": by,
                }  # fmt: skip
                command = ["fit", "--config", config, "--run_dir", run_dir, *words]
                usual = ["--trainer.max_steps", "6", "--checkpoint.every_n_train_steps", "6"]
                several = ["--trainer.strategy", "replicated", "--trainer.devices", str(tasks)] if tasks > 1 else []
                command = [str(folder), *map(str, command), *usual, *several]
                processes.append(forks.start(fit_as_task, *command, folder=run_dir, log=log, environment=environment))
            codes = [forks.ended(process) for process in processes]
        texts = [log.read_text() for log in logs]
        assert codes == [0] * tasks, texts
        return texts

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, job: Run) -> Path:
    """A run that nobody disturbed, on one process; two micro-batches give the sums of two processes."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    job(folder, "--model.micro_batch_size", "2")
    return folder


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """What the checkpoint after the last step holds."""
    (path,) = run.glob("checkpoints/*step=6*.ckpt")
    state = torch.load(path, weights_only=True)["state_dict"]
    return {name: value.view(-1).view(torch.uint8) for name, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("tasks", "asked"), [(1, 0), (2, 1)])
def test_a_requeued_job_ends_with_the_weights_of_one_that_was_not(
    tasks: int, asked: int, tmp_path: Path, job: Run, whole: Path
):
    """One task of several is enough to ask."""
    words = ("--model.micro_batch_size", "2") if tasks == 1 else ()
    job(tmp_path / "run", *words, tasks=tasks, asked=asked)
    assert torch.load(tmp_path / "run/hpc_ckpt_1.ckpt", weights_only=True)["global_step"] == 3
    assert 3 <= len(steps_taken(tmp_path / "run")) < 6
    job(tmp_path / "run", *words, tasks=tasks)
    assert steps_taken(tmp_path / "run") == steps_taken(whole)
    assert_same(final_weights(tmp_path / "run"), final_weights(whole))


@pytest.mark.slow
def test_all_tasks_end_after_the_step_in_which_one_was_told_to(tmp_path: Path, job: Run):
    job(tmp_path / "run", tasks=2, asked=1, by="SIGTERM")
    assert len(steps_taken(tmp_path / "run")) == 3
