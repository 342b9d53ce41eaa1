"""Runs of a tiny model in a few lines: in Python, and through the command line in this process."""

import contextlib
import functools
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import docstring_parser
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from mezo_lightning import (
    CentralDifference,
    CrossEntropy,
    Generate,
    MeZO,
    MeZOModule,
    Pretrained,
    PromptDataModule,
    RewardObjective,
    Trajectory,
    cli,
    replay,
)
from mezo_lightning.data.batch import Batch
from mezo_lightning.reporting.records import RunRecords, StepRecord
from mezo_lightning.steps import Step

EPSILON = 3e-2
"""So large that a tiny random model writes different things at the two points."""


def module_of(model: str | Path, objective: Any = None, **arguments: Any) -> MeZOModule:
    """A module that tunes the model in a folder, by the loss of targets if nothing else is said."""
    arguments = {"optimizer": functools.partial(MeZO, lr=1e-3), "estimator": CentralDifference(EPSILON)} | arguments
    return MeZOModule(Pretrained(str(model)), objective or CrossEntropy(), **arguments)


def reward_of(reward: Any, **arguments: Any) -> RewardObjective:
    """The reward of six tokens."""
    return RewardObjective(reward, completer=Generate(max_new_tokens=6), **arguments)


def data_of(rows: Path, **arguments: Any) -> PromptDataModule:
    return PromptDataModule(
        str(rows), "{question}", **({"target": "{answer}", "num_validation": 4, "batch_size": 4} | arguments)
    )


def trainer_of(folder: Path, max_steps: int = 4, **arguments: Any) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"enable_checkpointing": False, "use_distributed_sampler": False, "num_sanity_val_steps": 0}
    return Trainer(
        accelerator="cpu", max_steps=max_steps, max_epochs=-1, default_root_dir=folder, **(quiet | usual | arguments)
    )


class Watch(Callback):
    """Keeps the records and the rows of the steps of a run."""

    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.rows: list[tuple[int, ...]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.records.append(outputs["record"])
        self.rows.append(batch.index)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, as bytes."""
    return {name: p.detach().clone().view(-1).view(torch.uint8) for name, p in module.named_parameters()}


def model_of(module: MeZOModule) -> nn.Module:
    assert module.model is not None
    return module.model


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, different


def replayed(run: Path, model: str | Path, dtype: torch.dtype = torch.float32, stop: int | None = None) -> nn.Module:
    """The base model, and the run's trajectory on top of it."""
    base = Pretrained(str(model)).load(dtype)
    log = Trajectory.open(run)
    replay(base, log, stop=stop)
    log.close()
    return base


def steps_taken(run: Path) -> list[Step]:
    """What the run's trajectory says."""
    with contextlib.closing(Trajectory.open(run)) as log:
        return list(log)


def steps_of(run: Path) -> list[StepRecord]:
    return RunRecords(run).steps()


def parse_docstrings_once() -> None:
    """A parser of four subcommands reads every docstring four times: most of the time that a command takes to start."""
    docstring_parser.parse_from_object = functools.lru_cache(maxsize=None)(docstring_parser.parse_from_object)


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    code: Any
    """None for success, else what SystemExit carries."""
    output: str
    """Standard output and error."""


def mezo(*words: Any) -> Outcome:
    """The command `mezo`, in this process."""
    output = io.StringIO()
    before, path = sys.argv, list(sys.path)
    sys.argv = ["mezo"]  # Lightning warns where the process has arguments of its own
    code = None
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            cli.main([str(word) for word in words])
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.argv, sys.path[:] = before, path
    return Outcome(code, output.getvalue())


Command = Callable[..., Outcome]


def write_config(path: Path, model: Path, rows: Path, objective: dict[str, Any]) -> Path:
    """A configuration that tunes a model, two steps between validations."""
    config = {
        "model": {
            "pretrained": {"name": str(model)},
            "objective": objective,
            "estimator": {"class_path": "CentralDifference", "init_args": {"epsilon": EPSILON}},
            "optimizer": {"class_path": "MeZO", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "train": str(rows), "prompt": "{question}", "target": "{answer}", "num_validation": 4, "batch_size": 4,
        },
        "trainer": {
            "max_steps": 4, "accelerator": "cpu", "val_check_interval": 2, "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }  # fmt: skip
    path.write_text(json.dumps(config))
    return path


def write_reward_config(path: Path, model: Path, rows: Path) -> Path:
    """The same, by reward."""
    completer = {"class_path": "Generate", "init_args": {"max_new_tokens": 6}}
    init_args = {"reward": "reward_examples.letters", "completer": completer}
    return write_config(path, model, rows, {"class_path": "RewardObjective", "init_args": init_args})
