"""A real Trainer, stopped anywhere and resumed, sees the batches that an uninterrupted run sees."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from mezo_lightning.data import PromptDataModule
from mezo_lightning.data.batch import Batch

# Advice of Lightning's that does not apply: a second run in the folder of the first, manual optimization, LeafSpec.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated"),
]

ROWS, BATCH_SIZE = 23, 4  # five batches an epoch, and three rows left over
PER_EPOCH = ROWS // BATCH_SIZE


class Recorder(LightningModule):
    """Counts a step for each batch, as manual optimization does, and notes the rows."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []
        self.fail_at = fail_at

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        assert isinstance(batch, Batch)
        if self.global_step == self.fail_at:
            raise RuntimeError("the machine went away")
        self.seen.append(batch.index)
        optimizer: Any = self.optimizers()
        optimizer.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("size", float(len(batch)), on_epoch=True, batch_size=len(batch))


def trainer_in(folder: Path, max_steps: int, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False, "num_sanity_val_steps": 0} | arguments),
    )


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(ROWS + 6)))
    return str(path)


def data_of(source: str, seed: int = 3) -> PromptDataModule:
    return PromptDataModule(source, "{text}", num_train=ROWS, num_validation=6, batch_size=BATCH_SIZE, seed=seed)


def run(folder: Path, source: str, max_steps: int, ckpt: str | None = None, **arguments: Any) -> list[tuple[int, ...]]:
    module = Recorder()
    trainer = trainer_in(folder, max_steps, **arguments)
    torch.manual_seed(max_steps)  # the global generator must not matter
    trainer.fit(module, data_of(source), ckpt_path=ckpt, weights_only=True)
    if ckpt is None:
        trainer.save_checkpoint(folder / "end.ckpt")
    return module.seen


STEPS = 3 * PER_EPOCH + 2


def test_the_whole_run_is_epochs_in_new_orders(tmp_path: Path, source: str) -> None:
    seen = run(tmp_path, source, STEPS)
    assert len(seen) == STEPS
    for first in (0, PER_EPOCH, 2 * PER_EPOCH):
        rows = [row for batch in seen[first : first + PER_EPOCH] for row in batch]
        assert len(set(rows)) == PER_EPOCH * BATCH_SIZE
    assert seen[:PER_EPOCH] != seen[PER_EPOCH : 2 * PER_EPOCH]


@pytest.mark.parametrize("stop", [1, 3, PER_EPOCH - 1, PER_EPOCH, PER_EPOCH + 1, 2 * PER_EPOCH, 2 * PER_EPOCH + 3])
def test_stopped_by_max_steps_and_resumed(tmp_path: Path, source: str, stop: int) -> None:
    whole = run(tmp_path, source, STEPS)
    start = run(tmp_path, source, stop)
    assert start == whole[:stop]
    assert run(tmp_path, source, STEPS, ckpt=str(tmp_path / "end.ckpt")) == whole[stop:]


@pytest.mark.parametrize("every", [2, 5, 7])
@pytest.mark.parametrize("arguments", [{}, {"precision": "bf16-true"}, {"val_check_interval": 3}])
def test_resumed_from_each_checkpoint_of_a_longer_run(
    tmp_path: Path, source: str, every: int, arguments: dict[str, Any]
) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=every)
    whole = run(tmp_path, source, STEPS, enable_checkpointing=True, callbacks=[saver], **arguments)
    for step in range(every, STEPS, every):
        path = str(tmp_path / "ckpt" / f"step={step}.ckpt")
        assert (
            run(tmp_path, source, STEPS, ckpt=path, callbacks=[saver], enable_checkpointing=True, **arguments)
            == whole[step:]
        ), step


@pytest.mark.parametrize("at_epoch_end", [False, True])
def test_resumed_from_checkpoints_of_validation_and_of_the_end_of_an_epoch(
    tmp_path: Path, source: str, at_epoch_end: bool
) -> None:
    saver = ModelCheckpoint(tmp_path / "ckpt", "{step}", save_top_k=-1, save_on_train_epoch_end=at_epoch_end)
    whole = run(tmp_path, source, STEPS, enable_checkpointing=True, callbacks=[saver])
    paths = sorted((tmp_path / "ckpt").glob("*.ckpt"))
    assert len(paths) >= 3
    for path in paths:
        step = int(path.stem.removeprefix("step="))
        again = run(tmp_path, source, STEPS, ckpt=str(path), enable_checkpointing=True, callbacks=[saver])
        assert again == whole[step:], path


def test_a_batch_that_was_interrupted_is_given_again(tmp_path: Path, source: str) -> None:
    whole = run(tmp_path, source, STEPS)
    stop = PER_EPOCH + 2
    saver = ModelCheckpoint(tmp_path / "ckpt", "last", save_on_exception=True, every_n_train_steps=1000)
    module = Recorder(fail_at=stop)
    trainer = trainer_in(tmp_path, STEPS, enable_checkpointing=True, callbacks=[saver])
    with pytest.raises(RuntimeError, match="the machine went away"):
        trainer.fit(module, data_of(source))
    assert module.seen == whole[:stop]
    (path,) = (tmp_path / "ckpt").glob("*.ckpt")
    again = run(tmp_path, source, STEPS, ckpt=str(path), enable_checkpointing=True, callbacks=[saver])
    assert again == whole[stop:]


@pytest.mark.parametrize("arguments", [{}, {"use_distributed_sampler": False}])
def test_shorter_epochs_cut_the_same_sequence(tmp_path: Path, source: str, arguments: dict[str, Any]) -> None:
    whole = run(tmp_path, source, STEPS)
    module = Recorder()
    trainer = trainer_in(tmp_path, STEPS, limit_train_batches=3, **arguments)
    trainer.fit(module, data_of(source))
    assert module.seen == whole
    assert trainer.current_epoch == -(-STEPS // 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"overfit_batches": 1}, "set num_train to a small number"),
        ({"reload_dataloaders_every_n_epochs": 1}, "leave it at 0"),
    ],
)
def test_what_would_break_the_order_is_refused(
    tmp_path: Path, source: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_in(tmp_path, 2, **arguments).fit(Recorder(), data_of(source))


def test_validation_and_test_see_every_row_in_order(tmp_path: Path, source: str) -> None:
    seen: list[int] = []

    class Validator(Recorder):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            seen.extend(batch.index)

        def predict_step(self, batch: Batch, batch_idx: int) -> tuple[int, ...]:
            return batch.index

    trainer = trainer_in(tmp_path, 2)
    trainer.validate(Validator(), data_of(source), verbose=False)
    assert seen == list(range(6))
    data = PromptDataModule(source, "{text}", predict=source, batch_size=10)
    predicted: Any = trainer.predict(Validator(), data)
    assert [row for batch in predicted for row in batch] == list(range(ROWS + 6))


def test_a_run_without_validation_rows_is_told_so_and_runs(tmp_path: Path, source: str) -> None:
    module = Recorder()
    with pytest.warns(UserWarning, match="Total length of `list` across ranks is zero"):
        trainer_in(tmp_path, 3).fit(module, PromptDataModule(source, "{text}", batch_size=BATCH_SIZE))
    assert len(module.seen) == 3
