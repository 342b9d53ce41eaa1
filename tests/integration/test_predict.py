"""`mezo predict` on rows that nobody has answered yet: completions without metrics, or one message before any."""

import json
from pathlib import Path
from typing import Any

import pytest
import reward_examples
from helpers import Command

REWARD = "--model.objective.init_args.reward"
COUNT = 7  # two batches of four


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Rows with nothing but a question."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"Where is {i}?"}) + "\n" for i in range(COUNT)))
    return path


@pytest.fixture
def predict(command: Command, questions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Any:
    """`predict(config, *words)` gives what the command did, the lines that it wrote, and what it warned of."""

    def run(config: Path, *words: Any) -> tuple[Any, list[dict[str, Any]], list[str]]:
        run_dir = tmp_path / "run"
        done = command("predict", "--config", config, "--run_dir", run_dir, "--data.predict", questions, *words)
        file = run_dir / "predictions.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return done, lines, [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]

    return run


def test_a_reward_that_needs_a_label_leaves_completions_without_metrics(predict: Any, reward_config: Path):
    done, lines, warnings = predict(reward_config, REWARD, "reward_examples.needs_gold")
    assert done.code is None, done.output
    assert [line["index"] for line in lines] == list(range(COUNT))
    assert [line["prompt"] for line in lines] == [f"Where is {i}?" for i in range(COUNT)]
    assert all(line["metrics"] == {} for line in lines)
    _, measured, none = predict(reward_config)
    assert [line["completion"] for line in lines] == [line["completion"] for line in measured]
    assert any(line["completion"] for line in lines)
    wanted = "predictions have no metrics: Reward needs_gold needs the column 'gold'; the data has: question."
    assert warnings == [wanted]
    assert none == [wanted]  # no other one for the second command


def test_a_reward_that_needs_no_label_gives_its_metrics(predict: Any, reward_config: Path):
    done, lines, warnings = predict(reward_config)
    assert done.code is None, done.output
    assert not warnings
    for line in lines:
        assert line["metrics"]["reward"] == reward_examples.letters([line["completion"]])[0]


def test_options_are_chosen_without_a_label(predict: Any, loss_config: Path):
    options = ["--data.options", '[" the mill", " the river"]', "--data.label", "label", "--data.target", "null"]
    done, lines, warnings = predict(loss_config, *options)
    assert done.code is None, done.output
    assert len(lines) == COUNT
    assert all(line["completion"] in ("the mill", "the river") and line["metrics"] == {} for line in lines)
    assert "to know the right one" in warnings[0]


@pytest.mark.parametrize(("config", "words", "message"), [
    ("loss", [], "set model.objective to a RewardObjective, whose completer writes"),
    ("reward", ["--model.encoding.max_length", 10], "row 0: a text of"),
    ("reward", ["--data.prompt", "{question} {hint}"], "'hint'"),
])  # fmt: skip
def test_what_cannot_be_completed_is_said_before_a_line_is_written(
    config: str, words: list[Any], message: str, predict: Any, request: pytest.FixtureRequest
):
    done, lines, _ = predict(request.getfixturevalue(f"{config}_config"), *words)
    assert str(done.code).startswith("mezo: error: "), done.output
    assert message in str(done.code)
    assert not lines


def test_one_long_row_among_many_is_named_before_a_line_is_written(predict: Any, reward_config: Path, questions: Path):
    with questions.open("a") as file:
        file.write(json.dumps({"question": "Where is it, then? " * 20}) + "\n")
    done, lines, _ = predict(reward_config)
    assert f"row {COUNT}: a text of" in str(done.code)
    assert not lines


def test_without_rows_it_says_which_to_give(command: Command, reward_config: Path, tmp_path: Path):
    for name, wanted in (
        ("predict", "no rows to predict: set data.predict to"),
        ("test", "no rows to test: set data.test"),
    ):
        done = command(name, "--config", reward_config, "--run_dir", tmp_path / "run")
        assert str(done.code).startswith(f"mezo: error: There are {wanted}"), done.output
        assert "TrainerFn" not in str(done.code)


def test_a_prediction_that_fails_leaves_the_last_one(predict: Any, loss_config: Path, reward_config: Path):
    _, before, _ = predict(reward_config)
    done, after, _ = predict(loss_config)
    assert done.code is not None
    assert after == before
    assert len(after) == COUNT
