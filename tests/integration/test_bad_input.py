"""Bad input gets one clear message before the first step, and mostly before a model is loaded."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Command, data_of, module_of, trainer_of
from torch import nn

from mezo_lightning import Pretrained

REWARD = "--model.objective.init_args.reward"


@pytest.mark.parametrize(("config", "words", "message"), [
    ("loss", ["--model.bogus", 1], "there is no option model.bogus; model has pretrained"),
    ("loss", ["--config", "{tmp}/bogus.yaml"], "bogus"),
    ("loss", ["--model.optimizer.init_args.learning_rate", 1], "learning_rate"),
    ("loss", ["--model.evaluator", "magic"], "model.evaluator"),
    ("loss", ["--model.estimator.init_args.epsilon", 0], "epsilon=0.0 must be a positive number"),
    ("loss", ["--seed_everything", "false"], "seed_everything=False: give a number"),
    ("loss", ["--data.prompt", "{{context}}?"], "context"),
    ("loss", ["--data.train", "/nowhere/rows.jsonl"], "Data file '/nowhere/rows.jsonl' does not exist"),
    ("loss", ["--data.train", "{tmp}/empty.jsonl"], "there are no rows in it"),
    ("loss", ["--data.train", "{tmp}/rows.xls"], "cannot read .xls"),
    ("loss", ["--data.batch_size", 100], "batch_size=100 is more than the 20 rows to train on"),
    ("loss", ["--data.options", '[" a", " b"]', "--data.target", "null"], "label"),
    ("loss", ["--data.target", "null"], "CrossEntropy needs something to predict"),
    ("loss", ["--model.encoding.max_length", 4], "row 0: a text of"),
    ("loss", ["--model.pretrained.name", "/nowhere/model"], "name='/nowhere/model' is not a folder"),
    ("reward", ["--model.encoding.max_length", 8], "8 tokens"),
    ("reward", [REWARD, "reward_examples.too_short"], "Reward too_short returned 3 values for 4 rows"),
    ("reward", [REWARD, "reward_examples.nan"], "Reward nan returned nan for row 0"),
    ("reward", [REWARD, "reward_examples.text"], "Reward text returned 'good' for row 0"),
    ("reward", [REWARD, "reward_examples.no_opinion"], "had no opinion on any of the first 4 rows"),
    ("reward", [REWARD, "reward_examples.needs_gold"], "Reward needs_gold needs the column 'gold'"),
    ("reward", [REWARD, "nowhere.reward"], "reward='nowhere.reward': No module named 'nowhere'"),
    ("reward", [REWARD, "reward_examples.gone"], "reward='reward_examples.gone'"),
    ("reward", [REWARD, "reward_examples.calls"], "which cannot be called"),
])  # fmt: skip
def test_one_message_and_no_step(
    config: str, words: list[Any], message: str, command: Command, request: pytest.FixtureRequest, tmp_path: Path
):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.xls").write_text("")
    (tmp_path / "bogus.yaml").write_text("model: {bogus: 1}")
    filled = [word.format(tmp=tmp_path) if isinstance(word, str) and "[" not in word else word for word in words]
    path = request.getfixturevalue(f"{config}_config")
    done = command("fit", "--config", path, "--run_dir", tmp_path / "run", *filled)
    assert str(done.code).startswith("mezo: error: ")
    assert message in str(done.code)
    assert len(str(done.code)) < 1200
    assert "Traceback" not in done.output
    assert not (tmp_path / "run/trajectory.bin").exists()
    assert not (tmp_path / "run/report.html").exists()


@pytest.mark.parametrize("words", [["--data.validation", "{file}"], ["--data.train", "{file}"]])
def test_a_prompt_that_is_longer_than_the_context_is_named_by_its_row(
    words: list[str], command: Command, reward_config: Path, tmp_path: Path
):
    """One row among many, found before any is used: the tiny model has a context of 96."""
    file = tmp_path / "long.jsonl"
    prompts = ["Where is it?"] * 12
    prompts[9] = "Where is it, then? " * 20
    file.write_text("".join(json.dumps({"question": text, "answer": " here"}) + "\n" for text in prompts))
    filled = [word.format(file=file) for word in words]
    done = command("fit", "--config", reward_config, "--run_dir", tmp_path / "run", *filled)
    assert str(done.code).startswith("mezo: error: row ")
    assert "does not fit: the limit is 96 tokens" in str(done.code)


class Unused(nn.Module):
    """A layer that holds weights and is asked for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.adapter = nn.Linear(4, 4)


@pytest.mark.parametrize("evaluator", ["copy", "leaf_scratch"])
def test_trainable_parameters_that_change_nothing_are_refused(evaluator: Any, tmp_path: Path, opt: Path, rows: Path):
    module = module_of(opt, evaluator=evaluator)
    module.model = Pretrained(str(opt)).load()
    module.model.add_module("dead", Unused())
    with pytest.raises(ValueError, match=r"dead\.adapter \(2 of them\) does not change the model's output"):
        trainer_of(tmp_path).fit(module, data_of(rows))
    assert not (tmp_path / "trajectory.bin").exists()


def test_frozen_parameters_that_change_nothing_are_no_matter(tmp_path: Path, opt: Path, rows: Path):
    module = module_of(opt)
    module.model = Pretrained(str(opt)).load()
    module.model.add_module("dead", Unused().requires_grad_(False))
    trainer = trainer_of(tmp_path, 1)
    trainer.fit(module, data_of(rows))
    assert trainer.global_step == 1


def test_a_model_without_trainable_parameters_is_refused(tmp_path: Path, opt: Path, rows: Path):
    module = module_of(opt)
    module.model = Pretrained(str(opt)).load().requires_grad_(False)
    with pytest.raises(ValueError, match="there is no trainable parameter"):
        trainer_of(tmp_path).fit(module, data_of(rows))
