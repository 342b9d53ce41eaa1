"""Runs with a penalty for leaving the base model."""

import csv
import functools
import json
import os
from pathlib import Path
from typing import Any

import jobs
import pytest
from helpers import Command, data_of, reward_of, steps_taken, trainer_of, write_reward_config

from mezo_lightning import CentralDifference, MeZO, MeZOModule, Pretrained
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.steps import Step

LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def vowels(completions: list[str], **columns: Any) -> list[float]:
    return [sum(1.0 if letter in "aeiou" else -0.5 for letter in text) for text in completions]


def penalised_fit(*, model: Path, rows: Path, run: Path, beta: float, steps: int = 3, strategy: str = "one") -> Any:
    """The steps of a run with LoRA, and what is validated after them."""
    objective = reward_of(vowels, beta=beta)
    optimizer, estimator = functools.partial(MeZO, lr=3e-2), CentralDifference(0.1, num_queries=2)
    tuned = MeZOModule(Pretrained(str(model), adapter=LORA), objective, estimator=estimator, optimizer=optimizer)
    devices = int(os.environ.get("WORLD_SIZE", "1"))
    trainer = trainer_of(
        run, steps, strategy=jobs.strategy_of(strategy), devices=devices, val_check_interval=steps,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(tuned, data_of(rows, batch_size=5, num_validation=5))
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return steps_taken(run) if trainer.is_global_zero else None, found


def sharded_fit(*, run: Path, **arguments: Any) -> Any:
    """The same on weights that are cut up, where they are put together as a whole; layer by layer is refused."""
    with pytest.raises(ValueError, match=r"beta=0\.5 .* use gather: whole"):
        penalised_fit(run=run / "layer", strategy="layer", **arguments)
    return penalised_fit(run=run / "whole", strategy="whole", **arguments)


def test_from_yaml(tmp_path: Path, opt: Path, rows: Path, command: Command):
    path = write_reward_config(tmp_path / "run.yaml", Path("/no/model"), rows)
    config = json.loads(path.read_text())
    config["model"]["objective"]["init_args"]["beta"] = 0.1
    path.write_text(json.dumps(config))
    refused = command("fit", "--config", path, "--run_dir", tmp_path / "refused")
    assert "beta=0.1 needs the base model" in refused.code, "before the model is looked for"
    config["model"]["pretrained"] = {"name": str(opt), "adapter": LORA}
    path.write_text(json.dumps(config))
    outcome = command("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert outcome.code is None, outcome.output
    rows_logged = list(csv.DictReader((tmp_path / "run" / "metrics.csv").read_text().splitlines()))
    assert float(rows_logged[0]["val/kl"]) == 0.0, "before the first step"
    assert all(float(row["kl"]) > 0 for row in rows_logged if row["objective/q0+"])
    for record in RunRecords(tmp_path / "run").validations():
        assert record.metrics["objective"] == pytest.approx(0.1 * record.metrics["kl"] - record.metrics["reward"])
    assert "KL divergence from the base model" in (tmp_path / "run" / "report.html").read_text()


def main(environment: dict[str, str], folder: Path, function: str, arguments: dict[str, Any]) -> None:
    setattr(jobs, function, globals()[function])
    jobs._main(environment, folder, function, arguments)


@pytest.mark.slow
def test_sharded_weights_say_what_whole_ones_do(tmp_path: Path, opt: Path, rows: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(jobs, "_main", main)
    common = {"model": opt, "rows": rows, "beta": 0.5, "steps": 2}
    steps, alone = penalised_fit(run=tmp_path / "one", **common)
    found = jobs.run_job("sharded_fit", 2, tmp_path / "job", run=tmp_path, **common)
    zero, one = jobs.succeeded(found)
    assert coefficients(zero[0]) == pytest.approx(coefficients(steps), rel=1e-2)
    for _, figures in (zero, one):
        assert figures["val/kl"] == pytest.approx(alone["val/kl"], rel=1e-2)
        assert figures["val/kl"] > 0
        assert figures["val/reward"] == alone["val/reward"]


def coefficients(steps: list[Step]) -> list[float]:
    return [c for step in steps for _, each in step.terms for c in each]
