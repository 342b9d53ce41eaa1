"""A start or a resume that is refused, for whatever reason, leaves the run folder byte for byte as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Command, data_of, mezo, trainer_of, write_config

from mezo_lightning import CrossEntropy, MeZOModule, Pretrained

REWARD = {"class_path": "RewardObjective", "init_args": {"reward": "reward_examples.letters"}}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, subfolders included."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def runs(opt: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the same model, "one" and "other", with different seeds, and their configuration."""
    folder = tmp_path_factory.mktemp("runs")
    config = write_config(folder / "loss.yaml", opt, rows, {"class_path": "CrossEntropy"})
    for name, seed in (("one", 0), ("other", 1)):
        done = mezo("fit", "--config", config, "--run_dir", folder / name, "--seed_everything", seed)
        assert done.code is None, done.output
    return folder


@pytest.mark.parametrize(("words", "message"), [
    (["--ckpt_path", "{tmp}/other/checkpoints/last.ckpt"], "is not the trajectory of the checkpoint"),
    (["--ckpt_path", "/nowhere/last.ckpt"], "/nowhere/last.ckpt"),
    (["--data.train", "/nowhere/rows.jsonl"], "does not exist"),
    (["--data.target", "null"], "CrossEntropy needs something to predict"),
    (["--model.encoding.max_length", 4], "row 0: a text of"),
    (["--model.pretrained.name", "/nowhere/model"], "is not a folder"),
    (["--model.optimizer.init_args.rounding", "compensated"], "the state was saved with rounding='stochastic'"),
    (["--trainer.precision", "bf16-true"], "set trainer.precision"),
    (["--model.objective", json.dumps(REWARD), "--model.objective.init_args.reward", "reward_examples.nan"], "nan"),
])  # fmt: skip
def test_a_refused_resume_changes_nothing(words: list[Any], message: str, command: Command, runs: Path, tmp_path: Path):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    before = contents(tmp_path)
    assert {"one/run.json", "one/metrics.csv", "one/config.yaml", "one/report.html"} <= before.keys()
    filled = [word.format(tmp=tmp_path) if str(word).startswith("{tmp}") else word for word in words]
    resume = ["--run_dir", tmp_path / "one", "--ckpt_path", "last", "--trainer.max_steps", 7]
    done = command("fit", "--config", tmp_path / "loss.yaml", *resume, *filled)
    assert str(done.code).startswith("mezo: error: "), done.output
    assert message in str(done.code)
    assert contents(tmp_path) == before


def test_a_checkpoint_whose_weights_were_changed_is_refused_and_nothing_else_changes(
    command: Command, runs: Path, tmp_path: Path
):
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "one/checkpoints/last.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1.0
    torch.save(checkpoint, path)
    before = contents(tmp_path)
    resume = ["--run_dir", tmp_path / "one", "--ckpt_path", "last", "--trainer.max_steps", 7]
    done = command("fit", "--config", tmp_path / "loss.yaml", *resume)
    assert "are not those that were saved" in str(done.code), done.output
    assert contents(tmp_path) == before


def test_a_checkpoint_whose_frozen_weights_were_changed_is_refused(tmp_path: Path, opt: Path, rows: Path):
    def module() -> MeZOModule:
        return MeZOModule(Pretrained(str(opt), trainable="bias"), CrossEntropy(), startup_checks=False)

    trainer, path = trainer_of(tmp_path, 1), tmp_path / "one.ckpt"
    trainer.fit(module(), data_of(rows))
    trainer.save_checkpoint(path)
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["state_dict"]["model.model.decoder.embed_tokens.weight"].view(torch.int32)[0, 0] ^= 1
    torch.save(checkpoint, path)
    before = (tmp_path / "trajectory.bin").read_bytes()
    with pytest.raises(ValueError, match=r"the frozen weights are not those of the run in .*trajectory\.bin"):
        trainer_of(tmp_path, 2).fit(module(), data_of(rows), ckpt_path=str(path))
    assert (tmp_path / "trajectory.bin").read_bytes() == before


def test_the_same_resume_is_good_where_nothing_is_wrong(command: Command, runs: Path, tmp_path: Path):
    """So the test above says something."""
    shutil.copytree(runs, tmp_path, dirs_exist_ok=True)
    resume = ["--run_dir", tmp_path / "one", "--ckpt_path", "last", "--trainer.max_steps", 7]
    done = command("fit", "--config", tmp_path / "loss.yaml", *resume)
    assert done.code is None, done.output
    assert "max_steps: 7" in (tmp_path / "one/config.yaml").read_text()


def sampled_by(name: str, **settings: Any) -> list[str]:
    sampler = {"class_path": name, "init_args": settings}
    return ["--model.optimizer", json.dumps({"class_path": "MeZO", "init_args": {"sampler": sampler}})]


SCALED = {"class_path": "Scaled", "init_args": {"scales": {"nowhere": 2.0}}}


@pytest.mark.parametrize(("words", "message"), [
    (["--data.train", "/nowhere/rows.jsonl"], "does not exist"),
    (["--data.target", "null"], "CrossEntropy needs something to predict"),
    (["--model.pretrained.name", "/nowhere/model"], "is not a folder"),
    (sampled_by("Subset", blocks="nowhere"), "Subset(blocks='nowhere') is found in the name of no trainable parameter"),
    (sampled_by("Scaled", **SCALED["init_args"]), "'nowhere' is found in the name of no trainable parameter"),
    (sampled_by("Subset", sampler=SCALED), "'nowhere' is found in the name of no trainable parameter"),
])  # fmt: skip
def test_a_refused_start_leaves_no_folder(
    words: list[Any], message: str, command: Command, loss_config: Path, tmp_path: Path
):
    done = command("fit", "--config", loss_config, "--run_dir", tmp_path / "run", *words)
    assert message in str(done.code)
    assert not (tmp_path / "run").exists()
