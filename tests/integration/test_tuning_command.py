"""`mezo tune` on a tiny model: what is measured is the run's own objective, and nothing is changed."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_same, data_of, model_of, module_of, weights, write_config

from mezo_lightning.cli import MeZOCLI
from mezo_lightning.data import PromptDataModule
from mezo_lightning.estimators import FZOO
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.module import MeZOModule
from mezo_lightning.optimizer import MeZO
from mezo_lightning.structured import LowRank
from mezo_lightning.tuning.measuring import count_probes
from mezo_lightning.tuning.trainer import TuningTrainer


def trainer(folder: Path) -> TuningTrainer:
    return TuningTrainer(accelerator="cpu", default_root_dir=folder, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize(
    ("num_batches", "message"),
    [(1, "num_batches=1 must be at least 2"), (6, "num_batches=6 of batch_size=4 need 24 rows, and there are 20")],
)
def test_too_few_rows_are_refused(num_batches: int, message: str, opt: Path, rows: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).tune(module_of(opt), data_of(rows), num_batches=num_batches)


def test_too_few_directions_are_refused_before_anything_is_loaded(tmp_path: Path):
    nowhere = module_of(tmp_path / "no model")
    with pytest.raises(ValueError, match="num_directions=7 must be at least 8"):
        trainer(tmp_path).tune(nowhere, data_of(tmp_path / "no rows"), num_directions=7)


@pytest.mark.slow
def test_directions_of_the_measurements_are_independent_of_the_run_and_its_lr_has_its_own_units(
    opt: Path, rows: Path, tmp_path: Path
):
    def tune(name: str, **parts: Any) -> dict[str, Any]:
        trainer(tmp_path / name).tune(module_of(opt, **parts), data_of(rows), num_batches=2, num_directions=8)
        return json.loads((tmp_path / name / "tuning.json").read_text())

    plain = tune("plain")
    structured = tune("structured", optimizer=partial(MeZO, sampler=LowRank(rank=1)), estimator=FZOO())
    assert structured["curvature"] == plain["curvature"]
    assert structured["units"].pop("sampler").startswith("LowRank(rank=1, core='identity', refresh_left=0")
    assert structured["units"] == {
        "measured_along": "Gaussian()",
        "moves_all_alike": True,
        "other_units": ["estimator: FZOO"],
    }
    assert [kept["advice"][1]["option"] for kept in (plain, structured)] == ["lr", "RMS step, not lr"]


@pytest.mark.slow
def test_the_command_takes_the_configuration_of_a_run_and_changes_nothing(
    opt: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    class Tune(MeZOCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"tune": {"model", "datamodule"}}

    monkeypatch.setattr(sys, "argv", ["mezo"])  # Lightning warns where the process has arguments of its own
    config = write_config(tmp_path / "run.yaml", opt, rows, {"class_path": "CrossEntropy"})
    words: list[Any] = ["tune", "--config", config, "--run_dir", tmp_path / "run"]
    words += ["--num_batches", 2, "--num_directions", 8]
    command = Tune(
        MeZOModule,
        PromptDataModule,
        trainer_class=TuningTrainer,
        args=[str(word) for word in words],
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=None,
    )
    assert_same(weights(model_of(command.model)), weights(Pretrained(str(opt)).load()))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["tuning.json", "tuning.png"]
    assert (tmp_path / "run" / "tuning.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert f"picture: {tmp_path / 'run' / 'tuning.png'}\n" in printed
    kept = json.loads((tmp_path / "run" / "tuning.json").read_text())
    assert kept["probes"] == count_probes(2, 8)
    assert 0 < kept["ladder"][0]["noise_floor"] < 1e-5  # of a loss in fp32
    assert kept["noise_floor"] in [rung["noise_floor"] for rung in kept["ladder"]]
    epsilon, *others = kept["advice"]
    assert 1e-3 <= float(epsilon["value"]) <= 1e-1
    assert [advice["option"] for advice in others] == ["lr", "raise"]
    assert "effective rank" in printed
    assert f"options: --model.estimator.init_args.epsilon {epsilon['value']}" in printed
