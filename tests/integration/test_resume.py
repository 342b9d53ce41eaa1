"""A run that was stopped and resumed is the run that was not; and no run goes on in the folder of another."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Watch, assert_same, data_of, model_of, module_of, replayed, trainer_of, weights
from lightning.pytorch.callbacks import ModelCheckpoint

from mezo_lightning import LowRank, MeZO, MeZOModule, Subset, Trajectory
from mezo_lightning.callbacks import RunRecorder
from mezo_lightning.reporting.records import RunRecords

STEPS = 10
ROWS = {"num_train": 14, "batch_size": 4}  # three batches an epoch
COSINE = functools.partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=STEPS)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def run(
    folder: Path, opt: Path, rows: Path, steps: int, ckpt: Path | None = None, every: int = 1, **arguments: Any
) -> Any:
    module, watch = module_of(opt, **({"lr_scheduler": COSINE} | arguments)), Watch()
    saver = ModelCheckpoint(folder / "ckpt", "{step}", save_top_k=-1, every_n_train_steps=every)
    trainer = trainer_of(
        folder, steps, callbacks=[RunRecorder(), watch, saver], enable_checkpointing=True, val_check_interval=2,
        check_val_every_n_epoch=None, num_sanity_val_steps=-1,
    )  # fmt: skip
    trainer.fit(module, data_of(rows, **ROWS), ckpt_path=ckpt and str(ckpt), weights_only=True)
    return module, watch


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, opt: Path, rows: Path) -> tuple[Path, MeZOModule, Watch]:
    """Ten steps at a stretch."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder, opt, rows, STEPS, every=STEPS)


def records(folder: Path) -> list[Any]:
    """All that a run wrote down, but for times."""
    kept = RunRecords(folder)
    steps = [replace(step, seconds=0.0, probes_per_second=0.0) for step in kept.steps()]
    return [*steps, *[replace(record, seconds=0.0) for record in kept.validations()], *kept.samples()]


def assert_same_run(folder: Path, module: MeZOModule, whole: tuple[Path, MeZOModule, Watch]) -> None:
    assert_same(weights(model_of(module)), weights(model_of(whole[1])))
    assert (folder / "trajectory.bin").read_bytes() == (whole[0] / "trajectory.bin").read_bytes()
    assert records(folder) == records(whole[0])


@pytest.mark.parametrize("stop", [1, 3, 5])  # 3 is the end of an epoch, 5 in the middle of one, between validations
def test_stopped_and_resumed(stop: int, tmp_path: Path, opt: Path, rows: Path, whole: Any):
    _, first = run(tmp_path, opt, rows, stop, every=stop)
    module, second = run(tmp_path, opt, rows, STEPS, tmp_path / f"ckpt/step={stop}.ckpt", every=STEPS)
    assert first.rows + second.rows == whole[2].rows
    assert_same_run(tmp_path, module, whole)


def test_the_seed_of_a_run_decides_what_its_directions_share(tmp_path: Path, opt: Path, rows: Path):
    """Which layers move, and the factors that steps share; a resumed run goes on with them, another one cannot."""
    optimizer = functools.partial(MeZO, lr=1e-3, sampler=Subset(LowRank(1, seed=5), fraction=0.5))

    def sampler_of(folder: Path) -> Any:
        with Trajectory.open(folder / "trajectory.bin") as log:
            return log.header.make_sampler()

    (whole, _), _ = (run(tmp_path / str(seed), opt, rows, 3, seed=seed, optimizer=optimizer) for seed in (0, 1))
    one, other = (sampler_of(tmp_path / str(seed)) for seed in (0, 1))
    assert one.seed != other.seed
    assert one.sampler == other.sampler == LowRank(1, seed=5)
    run(tmp_path / "again", opt, rows, 1, optimizer=optimizer)
    half = tmp_path / "again/ckpt/step=1.ckpt"
    with pytest.raises(ValueError, match=r"saved with sampler=Subset\(.* this optimizer has sampler=Subset\("):
        run(tmp_path / "again", opt, rows, 3, half, seed=1, optimizer=optimizer)
    again, _ = run(tmp_path / "again", opt, rows, 3, half, optimizer=optimizer)
    assert sampler_of(tmp_path / "again") == one
    assert_same(weights(model_of(again)), weights(model_of(whole)))


def test_resumed_from_before_the_end_of_the_trajectory(tmp_path: Path, opt: Path, rows: Path, whole: Any):
    """As after a kill: steps were taken since the last checkpoint, and are taken again."""
    run(tmp_path, opt, rows, 7, every=4)
    assert [record.step for record in RunRecords(tmp_path).steps()] == list(range(1, 8))
    module, watch = run(tmp_path, opt, rows, STEPS, tmp_path / "ckpt/step=4.ckpt", every=STEPS)
    assert watch.rows == whole[2].rows[4:]
    assert_same_run(tmp_path, module, whole)
    assert_same(weights(model_of(module)), weights(replayed(tmp_path, opt)))


def test_the_record_is_continuous_in_time(tmp_path: Path, opt: Path, rows: Path):
    run(tmp_path, opt, rows, 3)
    run(tmp_path, opt, rows, 5, tmp_path / "ckpt/step=3.ckpt", every=5)
    seconds = [record.seconds for record in RunRecords(tmp_path).steps()]
    assert seconds == sorted(seconds)
    info = RunRecords(tmp_path).info()
    assert info is not None
    assert (info.status, info.steps, info.planned_steps) == ("finished", 5, 5)


@pytest.mark.parametrize("difference", [{"seed": 1}, {"lr_scheduler": None}])
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_lost(
    difference: dict[str, Any], tmp_path: Path, opt: Path, rows: Path
):
    """Same base weights, same number of steps: only the steps tell the two runs apart."""
    run(tmp_path / "one", opt, rows, 5, every=5)
    run(tmp_path / "other", opt, rows, 5, every=5, **difference)
    before = {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is not the trajectory of the checkpoint"):
        run(tmp_path / "one", opt, rows, 6, tmp_path / "other/ckpt/step=5.ckpt")
    assert {path: path.read_bytes() for path in (tmp_path / "one").rglob("*") if path.is_file()} == before


def test_a_trajectory_that_is_shorter_than_the_checkpoint_is_refused(tmp_path: Path, opt: Path, rows: Path):
    run(tmp_path, opt, rows, 3)
    log = (tmp_path / "trajectory.bin").read_bytes()
    run(tmp_path, opt, rows, 5, tmp_path / "ckpt/step=3.ckpt")
    (tmp_path / "trajectory.bin").write_bytes(log)
    with pytest.raises(ValueError, match="is not the trajectory of the checkpoint"):
        run(tmp_path, opt, rows, 6, tmp_path / "ckpt/step=5.ckpt")


def test_a_folder_without_a_trajectory_is_refused(tmp_path: Path, opt: Path, rows: Path):
    run(tmp_path / "one", opt, rows, 2)
    with pytest.raises(FileNotFoundError, match="there is no trajectory"):
        run(tmp_path / "new", opt, rows, 3, tmp_path / "one/ckpt/step=2.ckpt")


def test_a_used_folder_is_refused_and_nothing_is_lost(tmp_path: Path, opt: Path, rows: Path):
    run(tmp_path, opt, rows, 2)
    before = records(tmp_path)
    with pytest.raises(FileExistsError, match="is the trajectory of an earlier run"):
        run(tmp_path, opt, rows, 2)
    assert records(tmp_path) == before
    assert len(before) > 2


def test_a_checkpoint_of_weights_alone_is_no_start_and_good_for_the_rest(tmp_path: Path, opt: Path, rows: Path):
    trainer = trainer_of(tmp_path, 2)
    trainer.fit(module_of(opt), data_of(rows))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    path = str(tmp_path / "weights.ckpt")
    assert trainer_of(tmp_path).validate(module_of(opt), data_of(rows), ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match="holds weights only"):
        trainer_of(tmp_path, 3).fit(module_of(opt), data_of(rows), ckpt_path=path)


def test_skipped_steps_are_counted_over_a_resume(tmp_path: Path, opt: Path, rows: Path):
    def broken() -> MeZOModule:
        module = module_of(opt, max_skipped_steps=4)
        module.model = replayed_nan(opt)
        return module

    trainer = trainer_of(tmp_path, 2)
    trainer.fit(broken(), data_of(rows))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    module = broken()
    with pytest.raises(RuntimeError, match="4 steps in a row"):
        trainer_of(tmp_path, 9).fit(module, data_of(rows), ckpt_path=str(tmp_path / "two.ckpt"), weights_only=True)
    assert module.global_step == 4


def replayed_nan(opt: Path) -> Any:
    from mezo_lightning import Pretrained

    model = Pretrained(str(opt)).load()
    model.get_decoder().final_layer_norm.weight.data.fill_(torch.nan)  # pyright: ignore
    return model
