"""The command ``mezo``: LightningCLI's subcommands for runs, and our own for what comes before and after.

    mezo fit|validate|test|predict --config FILE [--config FILE ...] [--any.option VALUE ...]
    mezo tune --config FILE [--num_batches N] [--num_directions N]
    mezo replay --trajectory RUN --output DIR
    mezo export --checkpoint FILE --output DIR
    mezo reward check --reward PATH --data FILE [--model FOLDER]
    mezo reward rescore --run RUN --reward PATH
    mezo judge --store FILE

Every run has a folder of its own, ``run_dir``, with its configuration, trajectory, records, logs, checkpoints and
report; resuming reopens it.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from jsonargparse import auto_cli, set_parsing_settings
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.trainer.states import TrainerFn

from mezo_lightning.callbacks import FlatRewardWarning, ReportWriter, RunRecorder, SampleTable
from mezo_lightning.commands.predictions import PredictionWriter
from mezo_lightning.commands.rebuild import export_checkpoint, replay_run
from mezo_lightning.commands.reward import check_reward, rescore
from mezo_lightning.data import PromptDataModule
from mezo_lightning.mistakes import plain
from mezo_lightning.module import MeZOModule
from mezo_lightning.parser import MeZOParser
from mezo_lightning.processes.ranks import RankError
from mezo_lightning.refusals import check_strategy_name
from mezo_lightning.reporting.late_loggers import BeginLogs, LateCSVLogger, LateTensorBoardLogger
from mezo_lightning.rewarding.settings import Reward
from mezo_lightning.skipping import TooManySkippedStepsError
from mezo_lightning.tuning.trainer import TuningTrainer
from rewards.person.commands import main as judge_command

_DESCRIPTION = (
    "Fine-tune a Hugging Face causal LM with forward passes only. Besides the commands below: `mezo replay` rebuilds "
    "tuned weights from a run's trajectory, `mezo export` writes a checkpoint as a Hugging Face folder, `mezo reward` "
    "tries out a reward, and `mezo judge` serves a page on which people choose between two texts."
)
_OWN: dict[str, Any] = {
    "replay": replay_run,
    "export": export_checkpoint,
    "reward": {"check": check_reward, "rescore": rescore},
}
_OF_A_REWARD = re.compile(r"--model\.objective(\.init_args)?\.reward\.(\w+)")
_SET_ALONE = {"class_path", "help", *(field.name for field in dataclasses.fields(Reward))}
_USER_ERRORS = (ValueError, FileNotFoundError, FileExistsError, TooManySkippedStepsError, RankError, ArgumentError)


class MeZOCLI(LightningCLI):
    """LightningCLI with a run folder, one seed, and the callbacks that make a run visible."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and one that measures before a run."""
        return {**LightningCLI.subcommands(), "tune": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what is not an argument of the model, the data or the trainer."""
        parser.add_argument(
            "--run_dir",
            type=str | None,
            default=None,
            help="folder of the run; null: a new one under runs/. To resume, give it again, with --ckpt_path last",
        )
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.add_lightning_class_args(SampleTable, "sample_table")
        parser.add_lightning_class_args(FlatRewardWarning, "flat_reward_warning")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.save_last": True})

    def before_instantiate_classes(self) -> None:
        """Refuse a strategy by its name: Lightning may have other reasons to, and would not say what to use."""
        trainer = self._get(self.config, "trainer")
        check_strategy_name(trainer["strategy"])
        if trainer["default_root_dir"] is not None:
            raise ValueError(
                f"trainer.default_root_dir={str(trainer['default_root_dir'])!r} is set by run_dir: use --run_dir"
            )

    def before_fit(self) -> None:
        """Refuse to write over an earlier run, before anything is loaded."""
        folder = Path(self.trainer.default_root_dir)
        requeued = SLURMEnvironment.detect() and any(folder.glob("hpc_ckpt_*.ckpt"))  # Lightning resumes by itself
        if not self._get(self.config, "ckpt_path") and not requeued and (folder / "trajectory.bin").exists():
            raise FileExistsError(
                f"run_dir={str(folder)!r} holds a run already: choose another --run_dir, leave it out for a new "
                "one, or go on with that run by --ckpt_path last"
            )

    def _parse_ckpt_path(self) -> None:
        """Let the configuration count: Lightning would put the checkpoint's model arguments in its place in silence."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Point the trainer, its loggers and callbacks to the run folder."""
        run_dir = self._get(self.config, "run_dir") or f"runs/{datetime.now():%Y%m%d-%H%M%S}"
        config = self._get(self.config_init, "trainer")
        loggers = config["logger"]
        if loggers is None:
            # The names are empty so that both write to the run folder itself.
            loggers = [kind(run_dir, name="", version="") for kind in (LateCSVLogger, LateTensorBoardLogger)]
        return super().instantiate_trainer(
            **kwargs,
            default_root_dir=run_dir,
            logger=loggers if self.subcommand == "fit" else False,
            callbacks=[BeginLogs(), RunRecorder(), *self._callbacks(config), PredictionWriter(), ReportWriter()],
        )

    @staticmethod
    def _callbacks(config: dict[str, Any]) -> list[Callback]:
        """The user's callbacks, and a progress bar if there is none among them."""
        given = config["callbacks"]
        callbacks = given if isinstance(given, list) else [] if given is None else [given]
        wants_bar = config["enable_progress_bar"] is not False
        if wants_bar and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            callbacks = [*callbacks, StepProgressBar()]
        return callbacks


class SaveRunConfig(SaveConfigCallback):
    """Lightning's callback, for runs that have passed all checks: nothing else may replace a run's configuration."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the folder alone: this hook comes before any check."""

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml, in a run that starts from the base model and validates it first."""
        super().setup(trainer, pl_module, TrainerFn.FITTING)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write config.yaml, in any other run."""
        super().setup(trainer, pl_module, TrainerFn.FITTING)


class StepProgressBar(TQDMProgressBar):
    """Lightning's bar without the version number, which a run folder does not have."""

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What is shown beside the bar."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


def _seed(value: bool | int) -> int:
    if isinstance(value, bool):
        raise ValueError(f"seed_everything={value}: give a number, for it decides directions and data order too")
    return value


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: What follows ``mezo``; None for the process's own arguments.
    """
    words = list(sys.argv[1:] if args is None else args)
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    _silence()
    sys.path.append(os.getcwd())  # so that a reward in a file beside the configuration can be imported
    try:
        _check_words(words)
        if words and words[0] in _OWN:
            command = {words[0]: _OWN[words[0]]}
            auto_cli(command, args=words, as_positional=False, exit_on_error=False, parser_class=MeZOParser)
        elif words and words[0] == "judge":
            judge_command(words[1:])
        else:
            _run(_command_line(words), args if args is None else words)
    except _USER_ERRORS as error:
        sys.exit(f"mezo: error: {plain(error)}")


def _check_words(words: Sequence[str]) -> None:
    """Refuse what jsonargparse would take for the beginning of a list of rewards, in the place of the one in a file."""
    for word in words:
        found = _OF_A_REWARD.match(word)
        if found and found[2] not in _SET_ALONE:
            raise ValueError(
                f"{word.partition('=')[0]} would put the reward's other settings back to their defaults: write an "
                "overlay and give it with --config, or JSON, --model.objective.init_args.reward "
                "'{\"init_args\": {...}}'"
            )


def _command_line(words: Sequence[str]) -> type[MeZOCLI]:
    """The command line with all subcommands, or where one is asked for, with that one: each takes half a second."""
    every = MeZOCLI.subcommands()
    asked = {word: every[word] for word in words[:1] if word in every}

    class CommandLine(MeZOCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return asked or every

    return CommandLine


def _run(command_line: type[MeZOCLI], args: list[str] | None) -> None:
    command_line(
        MeZOModule,
        PromptDataModule,
        trainer_class=TuningTrainer,
        parser_class=MeZOParser,
        args=args,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        # Not the parser's own exit, which prints all options of all classes before its one line.
        parser_kwargs={
            "description": _DESCRIPTION,
            "exit_on_error": False,
            **{command: {"exit_on_error": False} for command in command_line.subcommands()},
        },
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={
            "num_sanity_val_steps": -1,  # the whole of it: "before" is measured on all validation rows
            "check_val_every_n_epoch": None,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
        },
    )


def _silence() -> None:
    """Hush what others print about things that are so on purpose."""
    for message in (
        r".*LightningCLI's args parameter",  # main() takes either
        r".*does not have many workers",  # a batch is a few strings
        r".*Checkpoint directory .* exists and is not empty",  # a resumed run
        r".*Experiment logs directory .* exists and is not empty",
        r".*Couldn't infer the batch indices",  # rows carry their own
        r".*The dirpath has changed from",  # a checkpoint that is validated or tested from elsewhere
        r".*isinstance\(treespec, LeafSpec\)",  # Lightning 2.6 on torch 2.13
    ):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)
    transformers.utils.logging.disable_progress_bar()
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed, which transformers imports, warns of it


if __name__ == "__main__":
    main()
