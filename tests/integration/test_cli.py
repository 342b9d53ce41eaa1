"""The commands, from a configuration to files on disk: fit, validate, test, predict, replay, export."""

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reward_examples
import torch
from helpers import Command, assert_same, mezo, replayed, steps_of, steps_taken, weights, write_reward_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from mezo_lightning import MeZOModule
from mezo_lightning.reporting.records import RunRecords

EVERY_STEP = {
    "objective/q0+", "objective/q0-", "projected_grad", "lr", "update_rms", "probes_per_second", "tie_fraction",
    "valid_fraction", "skipped_steps",
}  # fmt: skip


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def original(opt: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps by reward."""
    folder = tmp_path_factory.mktemp("original")
    done = mezo("fit", "--config", write_reward_config(folder / "reward.yaml", opt, rows), "--run_dir", folder / "run")
    assert done.code is None, done.output
    return folder / "run"


@pytest.fixture
def fitted(original: Path, tmp_path: Path) -> Path:
    """A copy of it, to do things to."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def test_a_run_folder_has_logs_records_checkpoints_and_a_report(fitted: Path):
    with open(fitted / "metrics.csv", newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["projected_grad"]]
    assert len(logged) == 4
    wanted = EVERY_STEP | {"identical_fraction", "reward", "rewards/letters"}
    assert all(row[name] != "" for row in logged for name in wanted)
    for row, record in zip(logged, steps_of(fitted), strict=True):
        assert float(row["objective/q0+"]) == pytest.approx(record.objective["q0+"])
        assert float(row["projected_grad"]) == pytest.approx(record.projected_grads[0])

    events = EventAccumulator(str(fitted))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= wanted | {"val/reward"}
    assert [event.step for event in events.Scalars("val/reward")] == [0, 1, 3]  # Lightning counts from 0
    assert [record.step for record in RunRecords(fitted).validations()] == [0, 2, 4]
    assert "letters" in (fitted / "report.html").read_text()
    assert (fitted / "checkpoints/last.ckpt").is_file()
    assert "letters" in (fitted / "config.yaml").read_text()


def test_the_seed_decides_the_run(command: Command, loss_config: Path, tmp_path: Path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        command("fit", "--config", loss_config, "--run_dir", tmp_path / name, "--seed_everything", seed)
    logs = {name: (tmp_path / name / "trajectory.bin").read_bytes() for name in ("one", "same", "other")}
    assert logs["one"] == logs["same"]
    seeds = [{seed for step in steps_taken(tmp_path / name) for seed, _ in step.terms} for name in ("one", "other")]
    assert not seeds[0] & seeds[1]


def test_replay_and_export_give_the_same_files(command: Command, fitted: Path, tmp_path: Path, opt: Path):
    replay = command("replay", "--trajectory", fitted, "--output", tmp_path / "replayed")
    assert replay.code is None
    assert "Replayed 4 of 4 steps" in replay.output
    checkpoint = fitted / "checkpoints/last.ckpt"
    export = command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    assert export.code is None
    assert sha(tmp_path / "replayed/model.safetensors") == sha(tmp_path / "exported/model.safetensors")
    assert sha(tmp_path / "replayed/model.safetensors") != sha(opt / "model.safetensors")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "replayed")
    assert AutoTokenizer.from_pretrained(tmp_path / "replayed")("Where").input_ids
    assert_same(weights(opened), weights(replayed(fitted, opt)))
    loaded = MeZOModule.load_from_checkpoint(checkpoint)
    assert loaded.model is not None
    assert_same(weights(loaded.model), weights(opened))

    command("replay", "--trajectory", fitted / "trajectory.bin", "--output", tmp_path / "two", "--steps", 2)
    assert_same(weights(AutoModelForCausalLM.from_pretrained(tmp_path / "two")), weights(replayed(fitted, opt, stop=2)))


@pytest.mark.parametrize(("words", "message"), [
    (["--steps", "5"], "steps=5: "),
    (["--steps", "-1"], "steps=-1: "),
    (["--output", "{run}"], "exists and is not an empty folder"),
    (["--trajectory", "/nowhere"], "there is no trajectory /nowhere"),
    (["--trajectory", "{run}/config.yaml"], "is not a trajectory"),
])  # fmt: skip
def test_replays_that_cannot_be(words: list[str], message: str, command: Command, fitted: Path, tmp_path: Path):
    filled = [word.format(run=fitted) for word in words]
    done = command("replay", "--trajectory", fitted, "--output", tmp_path / "out", *filled)
    assert str(done.code).startswith("mezo: error: ")
    assert message in str(done.code)
    assert not (tmp_path / "out").exists()


def test_a_trajectory_of_another_model_of_the_same_shape_is_refused(
    command: Command, fitted: Path, tmp_path: Path, folders: dict[str, Path], opt: Path, loss_config: Path
):
    base = tmp_path / "base"  # the run remembers where its base was; now another model is there
    base.symlink_to(opt)
    command("fit", "--config", loss_config, "--run_dir", tmp_path / "second", "--model.pretrained.name", base)
    base.unlink()
    base.symlink_to(folders["opt2"])
    done = command("replay", "--trajectory", tmp_path / "second", "--output", tmp_path / "out")
    assert str(done.code).startswith("mezo: error: ")
    assert "starts from other weights than this model has" in str(done.code)
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()


def test_evaluating_in_a_runs_folder_leaves_the_run_alone(
    command: Command, fitted: Path, reward_config: Path, rows: Path
):
    before = {path: path.read_bytes() for path in fitted.rglob("*") if path.is_file()}
    words = ["--config", reward_config, "--run_dir", fitted, "--ckpt_path", fitted / "checkpoints/last.ckpt"]
    figures = command("validate", *words)
    assert figures.code is None, figures.output
    assert "val/reward" in figures.output
    tested = command("test", *words, "--data.test", rows, "--data.num_test", 5)
    assert "test/reward" in tested.output
    predicted = command("predict", *words, "--data.predict", rows)
    assert predicted.code is None, predicted.output
    assert {path: path.read_bytes() for path in before} == before
    lines = [json.loads(line) for line in (fitted / "predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(24))
    assert lines[3]["prompt"] == "Where is 3?"
    assert lines[3]["metrics"]["reward"] == reward_examples.letters([lines[3]["completion"]])[0]


def test_predictions_are_json_even_where_a_reward_has_no_opinion(
    command: Command, reward_config: Path, tmp_path: Path, rows: Path
):
    words = ["--model.objective.init_args.reward", "reward_examples.no_opinion", "--data.predict", rows]
    done = command("predict", "--config", reward_config, "--run_dir", tmp_path / "run", *words)
    assert done.code is None, done.output
    lines = (tmp_path / "run/predictions.jsonl").read_text().splitlines()
    assert "NaN" not in lines[0]
    assert json.loads(lines[0])["metrics"]["reward"] is None


def test_the_configuration_counts_and_not_the_checkpoints(
    command: Command, fitted: Path, reward_config: Path, tmp_path: Path
):
    """Lightning alone would take the model's arguments out of the checkpoint, without a word."""
    words = ["--model.objective.init_args.completer.init_args.max_new_tokens", 2]
    done = command(
        "validate", "--config", reward_config, "--run_dir", tmp_path / "other",
        "--ckpt_path", fitted / "checkpoints/last.ckpt", *words,
    )  # fmt: skip
    assert done.code is None, done.output
    [line] = [line for line in done.output.splitlines() if "val/tokens" in line]
    assert "2.0" in line


def test_a_saved_configuration_runs_again(command: Command, fitted: Path, tmp_path: Path):
    done = command("fit", "--config", fitted / "config.yaml", "--run_dir", tmp_path / "again")
    assert done.code is None, done.output
    assert (tmp_path / "again/trajectory.bin").read_bytes() == (fitted / "trajectory.bin").read_bytes()


@pytest.mark.parametrize("words", [[], ["--trainer.fast_dev_run", "true"]])
def test_a_used_folder_is_refused_before_loading_and_loses_nothing(
    words: list[str], command: Command, fitted: Path, reward_config: Path
):
    before = {path: path.read_bytes() for path in fitted.rglob("*") if path.is_file()}
    done = command(
        "fit", "--config", reward_config, "--run_dir", fitted, "--model.pretrained.name", "/nowhere/model", *words
    )
    assert str(done.code).startswith(f"mezo: error: run_dir='{fitted}' holds a run already")
    assert {path: path.read_bytes() for path in before} == before


def test_resumed_by_name(command: Command, reward_config: Path, tmp_path: Path):
    run, words = tmp_path / "run", ["--config", reward_config, "--run_dir", tmp_path / "run"]
    assert command("fit", *words).code is None
    done = command("fit", *words, "--ckpt_path", "last", "--trainer.max_steps", 7)
    assert done.code is None, done.output
    assert [record.step for record in steps_of(run)] == list(range(1, 8))
    assert len(steps_taken(run)) == 7
    assert sorted(path.name for path in (run / "checkpoints").iterdir())[-1] == "last.ckpt"


def test_a_flat_reward_says_so(command: Command, reward_config: Path, tmp_path: Path):
    words = ["--model.objective.init_args.reward", "reward_examples.constant", "--flat_reward_warning.patience", 2]
    done = command("fit", "--config", reward_config, "--run_dir", tmp_path / "run", *words)
    assert done.code is None
    assert "Flat reward. In all 2 steps every pair of probes tied" in " ".join(done.output.split()).replace("│ ", "")
    assert "Nothing was learned: in all 4 steps every pair of probes tied" in done.output
    page = (tmp_path / "run/report.html").read_text()
    assert "Nothing was learned" in page
    assert "larger epsilon" in page
    records = steps_of(tmp_path / "run")
    assert all(record.tie_fraction == 1 and record.projected_grads == [0.0] for record in records)


def test_too_many_skipped_steps_end_with_a_reason_and_a_report(command: Command, reward_config: Path, tmp_path: Path):
    words = [
        "--model.objective.init_args.reward", "reward_examples.nan", "--model.objective.init_args.on_failure", "mask",
        "--model.startup_checks", "false", "--model.max_skipped_steps", 3, "--trainer.num_sanity_val_steps", 0,
    ]  # fmt: skip
    done = command("fit", "--config", reward_config, "--run_dir", tmp_path / "run", *words)
    assert str(done.code).startswith("mezo: error: 3 steps in a row were skipped, the last one because 0 of 4 samples")
    assert "Traceback" not in done.output
    assert len(steps_of(tmp_path / "run")) == 3
    info = RunRecords(tmp_path / "run").info()
    assert info is not None
    assert info.status == "failed"
    assert "3 steps in a row were skipped" in (tmp_path / "run/report.html").read_text()


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_through_the_command_line(
    precision: str, command: Command, loss_config: Path, tmp_path: Path, opt: Path
):
    words = ["--trainer.precision", precision, "--model.optimizer.init_args.rounding", "compensated"]
    assert command("fit", "--config", loss_config, "--run_dir", tmp_path / "run", *words).code is None
    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "replayed")
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    assert sha(tmp_path / "replayed/model.safetensors") == sha(tmp_path / "exported/model.safetensors")
    dtype = torch.bfloat16 if precision == "bf16-true" else torch.float16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "exported").dtype == dtype


def test_a_paid_reward_is_left_alone_where_start_up_checks_are_off(
    command: Command, reward_config: Path, tmp_path: Path
):
    words: list[Any] = [
        "--model.objective.init_args.reward", "reward_examples.paid", "--trainer.num_sanity_val_steps", 0,
        "--trainer.limit_val_batches", 0, "--trainer.max_steps", 2,
    ]  # fmt: skip
    off = ["--model.startup_checks", "false"]
    assert command("fit", "--config", reward_config, "--run_dir", tmp_path / "off", *words, *off).code is None
    assert reward_examples.calls == 4  # two steps of two probes
    assert command("fit", "--config", reward_config, "--run_dir", tmp_path / "on", *words).code is None
    assert reward_examples.calls == 4 + 5


@pytest.mark.slow
def test_a_reward_in_the_working_folder_is_found_by_the_console_script(reward_config: Path, tmp_path: Path):
    (tmp_path / "house_reward.py").write_text(
        "def brief(completions, **_):\n    return [-float(len(text)) for text in completions]\n"
    )
    words = [
        "fit", "--config", reward_config, "--run_dir", "run", "--trainer.max_steps", "1",
        "--model.objective.init_args.reward", "house_reward.brief",
    ]  # fmt: skip
    script = Path(sys.executable).with_name("mezo")
    done = subprocess.run([script, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "rewards/brief" in steps_of(tmp_path / "run")[0].metrics


@pytest.mark.slow
def test_python_m_shows_one_line_for_a_mistake_and_fails(tmp_path: Path):
    words = [sys.executable, "-m", "mezo_lightning", "replay", "--trajectory", "gone", "--output", "out"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "mezo: error: there is no trajectory gone"
    assert "Traceback" not in done.stderr
