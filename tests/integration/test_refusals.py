"""What cannot work is refused by its name, with what to use instead, before a model is loaded."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from helpers import Command, data_of, module_of, trainer_of
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from mezo_lightning.strategies import ZeRO3Strategy

NOWHERE = "/nowhere/model"
"""Loading it would be a FileNotFoundError."""


@pytest.mark.parametrize(("arguments", "message"), [
    ({"precision": "bf16-mixed"}, "trainer.precision='bf16-mixed' .* use one of 32-true, bf16-true, 16-true"),
    ({"precision": "64-true"}, "trainer.precision='64-true'"),
    ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2 .* model.micro_batch_size"),
    ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 .* model.transform: {class_path: Clip"),
    ({"strategy": "ddp"}, "trainer.strategy=DDPStrategy .* --trainer.devices 1"),
    ({"callbacks": [StochasticWeightAveraging(1e-2)]}, "StochasticWeightAveraging .* model.lr_scheduler"),
    ({"callbacks": [GradientAccumulationScheduler({2: 4})]}, "GradientAccumulationScheduler .* model.micro_batch_size"),
    (
        {"callbacks": [ModelCheckpoint(train_time_interval=timedelta(minutes=1))], "enable_checkpointing": True},
        "train_time_interval .* every_n_train_steps",
    ),
    ({"strategy": ZeRO3Strategy(), "plugins": [AsyncCheckpointIO()]}, "AsyncCheckpointIO .* leave the plugin out"),
])  # fmt: skip
def test_trainers_that_cannot_work(arguments: dict[str, Any], message: str, tmp_path: Path, rows: Path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **arguments).fit(module_of(NOWHERE), data_of(rows))


def test_without_a_refusal_the_model_would_be_looked_for(tmp_path: Path, rows: Path):
    """So the tests above say something."""
    with pytest.raises(FileNotFoundError, match=NOWHERE):
        trainer_of(tmp_path).fit(module_of(NOWHERE), data_of(rows))


def test_what_only_matters_to_training_is_no_obstacle_to_validating(tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, accumulate_grad_batches=2, gradient_clip_val=1.0)
    assert trainer.validate(module_of(opt), data_of(rows), verbose=False)


@pytest.mark.filterwarnings("ignore:\\s*Unable to serialize instance")  # the default of an argument of averaging
@pytest.mark.parametrize(("words", "message"), [
    (["--trainer.strategy", "ddp"], "trainer.strategy=ddp cannot be used"),
    (["--trainer.strategy", "fsdp"], "trainer.strategy=fsdp cannot be used"),
    (["--trainer.strategy", "deepspeed_stage_3"], "trainer.strategy=deepspeed_stage_3 cannot be used"),
    (["--trainer.strategy", "DDPStrategy"], "cannot be used"),
    (["--trainer.precision", "bf16-mixed"], "trainer.precision='bf16-mixed' cannot be used"),
    (["--trainer.accumulate_grad_batches", 2], "data.batch_size to the whole batch and model.micro_batch_size"),
    (["--trainer.gradient_clip_val", 1.0], "trainer.gradient_clip_val=1.0"),
    (["--trainer.default_root_dir", "here"], "trainer.default_root_dir='here' is set by run_dir"),
    (["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", 0.1], "choose MeZO, for other optimizers need"),
    (["--trainer.callbacks+=StochasticWeightAveraging", "--trainer.callbacks.swa_lrs=0.1"], "cannot be used: av"),
    (["--checkpoint.train_time_interval", "00:01:00"], "train_time_interval"),
])  # fmt: skip
def test_command_lines_that_cannot_work(
    words: list[Any], message: str, command: Command, loss_config: Path, tmp_path: Path
):
    done = command(
        "fit", "--config", loss_config, "--model.pretrained.name", NOWHERE, "--run_dir", tmp_path / "run", *words
    )
    assert str(done.code).startswith("mezo: error: ")
    assert message in str(done.code)
    assert "Traceback" not in done.output
    assert not (tmp_path / "run").exists()
