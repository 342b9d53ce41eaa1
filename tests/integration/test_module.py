"""Under a real Trainer, a MeZOModule counts, stops, schedules, logs and loads as a Lightning user expects."""

import csv
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Watch, assert_same, data_of, model_of, module_of, reward_of, steps_taken, trainer_of, weights
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from reward_examples import default_dtype

from mezo_lightning import MeZO, MeZOModule
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.steps import round_coefficient

LR = 1e-3


def test_max_steps_global_step_and_checkpoint_intervals(tmp_path: Path, opt: Path, rows: Path):
    saver = ModelCheckpoint(tmp_path / "ckpt", "{step}", every_n_train_steps=2, save_top_k=-1)
    trainer = trainer_of(tmp_path, 5, callbacks=[saver], enable_checkpointing=True)
    module, watch = module_of(opt), Watch()
    trainer.callbacks.insert(0, watch)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.fit(module, data_of(rows))
    assert trainer.global_step == 5
    assert [record.step for record in watch.records] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (tmp_path / "ckpt").iterdir()) == ["step=2.ckpt", "step=4.ckpt"]
    assert len(steps_taken(tmp_path)) == 5
    assert not module.training
    assert not any(part.training for part in module.modules())


def test_max_time(tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, 100_000, max_time={"seconds": 1})
    trainer.fit(module_of(opt), data_of(rows))
    assert 0 < trainer.global_step < 100_000
    assert len(steps_taken(tmp_path)) == trainer.global_step


def linear(step: int) -> float:
    return LR * (1 - 0.8 * min(step, 4) / 4)


def cosine(step: int) -> float:
    return LR * (1 + math.cos(math.pi * step / 6)) / 2


SCHEDULERS: dict[str, tuple[Any, Any]] = {
    "linear": (
        functools.partial(torch.optim.lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.2, total_iters=4),
        linear,
    ),
    "cosine": (functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=6), cosine),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_step_once_a_step_and_the_lr_used_is_the_lr_recorded(
    name: str, tmp_path: Path, opt: Path, rows: Path
):
    scheduler, expected = SCHEDULERS[name]
    watch, monitor = Watch(), LearningRateMonitor()
    logger = CSVLogger(tmp_path / "logs", flush_logs_every_n_steps=1)
    trainer = trainer_of(tmp_path, 6, callbacks=[watch, monitor], logger=logger, log_every_n_steps=1)
    trainer.fit(module_of(opt, lr_scheduler=scheduler), data_of(rows))
    lrs = [record.lr[0] for record in watch.records]
    assert lrs == pytest.approx([expected(step) for step in range(6)])
    for step, record in zip(steps_taken(tmp_path), watch.records, strict=True):
        [(_, [coefficient])] = step.terms
        assert coefficient == round_coefficient(-record.lr[0] * record.projected_grads[0])
    with open(tmp_path / "logs/lightning_logs/version_0/metrics.csv", newline="") as file:
        logged = list(csv.DictReader(file))
    for column in ("lr", "lr-MeZO"):
        assert [float(row[column]) for row in logged if row[column]] == pytest.approx(lrs)


def test_early_stopping_on_a_validation_figure(tmp_path: Path, opt: Path, rows: Path):
    stopper = EarlyStopping("val/objective", mode="min", min_delta=100.0, patience=2)
    trainer = trainer_of(tmp_path, 50, callbacks=[stopper], val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module_of(opt), data_of(rows))
    assert trainer.global_step == 6  # measured, then two validations that are not better by 100


def test_reduce_lr_on_plateau_waits_for_validations(tmp_path: Path, opt: Path, rows: Path):
    plateau = functools.partial(ReduceLROnPlateau, monitor="val/loss", mode="max", threshold=100.0, patience=0)
    watch = Watch()
    trainer = trainer_of(tmp_path, 7, callbacks=[watch], val_check_interval=2, check_val_every_n_epoch=None)
    trainer.fit(module_of(opt, lr_scheduler=plateau), data_of(rows))
    assert [record.lr[0] / LR for record in watch.records] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01])


def test_reduce_lr_on_plateau_names_a_figure_that_is_not_logged(tmp_path: Path, opt: Path, rows: Path):
    module = module_of(opt, lr_scheduler=functools.partial(ReduceLROnPlateau, monitor="val/bleu"))
    with pytest.raises(ValueError, match=r"monitor='val/bleu', which is not logged; .*val/loss"):
        trainer_of(tmp_path, 7, val_check_interval=1).fit(module, data_of(rows))


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_load_from_checkpoint_and_evaluate_from_it(precision: Any, tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, 3, precision=precision)
    module = module_of(opt)
    trainer.fit(module, data_of(rows))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    data = data_of(rows, test=str(rows), num_test=6, num_train=14)
    live = trainer.test(module, data, verbose=False)

    loaded = MeZOModule.load_from_checkpoint(tmp_path / "end.ckpt")
    assert_same(weights(model_of(loaded)), weights(model_of(module)))
    assert loaded.objective == module.objective
    assert loaded.pretrained == module.pretrained

    fresh = module_of(opt)
    other = trainer_of(tmp_path / "other", precision=precision)
    path = str(tmp_path / "end.ckpt")
    assert other.test(fresh, data, ckpt_path=path, verbose=False) == live
    assert_same(weights(model_of(fresh)), weights(model_of(module)))
    assert other.validate(fresh, data, ckpt_path=path, verbose=False)
    predicted: Any = other.predict(fresh, data, ckpt_path=path)
    assert [row["index"] for batch in predicted for row in batch] == list(range(6))
    assert not (tmp_path / "other/trajectory.bin").exists()


def test_a_checkpoint_of_another_precision_is_refused(tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, 1)
    trainer.fit(module_of(opt), data_of(rows))
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ValueError, match=r"torch.float32, this model's are torch.bfloat16; set trainer.precision"):
        trainer_of(tmp_path, precision="bf16-true").validate(
            module_of(opt), data_of(rows), ckpt_path=str(tmp_path / "end.ckpt")
        )


def test_ones_own_model_is_tuned_in_the_trainers_precision(tmp_path: Path, opt: Path, rows: Path):
    module = module_of(opt)
    mine = module.model = Pretrained(str(opt)).load()
    mine.requires_grad_(False)
    mine.get_input_embeddings().requires_grad_(True)
    before = mine.get_input_embeddings().weight.detach().clone()
    trainer_of(tmp_path, 3, precision="bf16-true").fit(module, data_of(rows))
    assert module.model is mine
    assert {parameter.dtype for parameter in mine.parameters()} == {torch.bfloat16}
    assert not torch.equal(mine.get_input_embeddings().weight.detach(), before.bfloat16())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_the_tuned_model_computes_as_the_exported_one(precision: Any, tmp_path: Path, folders: Any, rows: Path):
    """Lightning's half precisions would cast rotary frequencies too, which transformers keeps in fp32."""
    module = module_of(folders["llama"])
    trainer_of(tmp_path, 1, precision=precision).fit(module, data_of(rows))
    model = model_of(module)
    again = Pretrained(str(folders["llama"])).load(next(model.parameters()).dtype)
    again.load_state_dict(model.state_dict())
    assert {name: b.dtype for name, b in model.named_buffers()} == {name: b.dtype for name, b in again.named_buffers()}
    ids = torch.arange(60).view(1, -1) + 30
    assert torch.equal(model(ids).logits, again(ids).logits)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
def test_rewards_compute_in_fp32_whatever_the_weights_are(precision: Any, tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, 1, precision=precision)
    [figures] = trainer.validate(module_of(opt, reward_of(default_dtype)), data_of(rows), verbose=False)
    assert figures["val/reward"] == pytest.approx(0.123456789, rel=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"micro_batch_size": 0}, "micro_batch_size=0"),
    ({"max_skipped_steps": 0}, "max_skipped_steps=0"),
    ({"optimizer": functools.partial(MeZO, lr=-1.0)}, "lr=-1.0"),
    ({"optimizer": functools.partial(torch.optim.AdamW, lr=1.0)}, "AdamW needs gradients"),
    ({"lr_scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau}, "does not say what to watch"),
])  # fmt: skip
def test_arguments_that_cannot_work_are_refused_at_once(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        module_of("/nowhere/model", **arguments)
