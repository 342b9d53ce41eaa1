"""`mezo reward check` and `mezo reward rescore`: what a reward says, before a run is spent on it and after."""

import json
from pathlib import Path

import pytest
import yaml
from helpers import Command, mezo, write_reward_config

from mezo_lightning.commands.reward import check_reward
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.rewarding.settings import Reward

MINE = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    if solution_str == "crash":
        raise KeyError("no such thing")
    return {"score": scale * (solution_str == ground_truth), "length": len(solution_str)}

async def later(completions, answer, log_metric=None, log_extra=None, **columns):
    log_metric("asked", len(completions))
    log_extra("why", [f"{len(text)} letters" for text in completions])
    return [None if text == "crash" else float(text == gold) for text, gold in zip(completions, answer)]

def group(completions, answers, states):
    return [0.0] * len(completions)

def tokens(completion_ids):
    return [float(len(ids)) for ids in completion_ids]

def constant(completion):
    return 0.5

def down(completion):
    raise OSError("the judge is down")

def forever(completion, step, run, trainer_state):
    while completion == "crash":
        pass
    return float(step + trainer_state.global_step + len(run))

def gold_in(text, answers):
    return float(any(gold in text for gold in answers))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with reward functions and completions, which is the current one."""
    (tmp_path / "mine.py").write_text(MINE)
    lines = [
        {"question": "1+1?", "answer": "2", "completion": "2"},
        {"question": "1+2?", "answer": "3", "completion": "crash"},
        {"question": "2+2?", "answer": "4", "completion": "5"},
        {"question": "2+2?", "answer": "4", "completion": "5"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "130")
    return tmp_path


def test_check_shows_convention_values_failures_and_time(here: Path, command: Command):
    done = command(
        *("reward", "check", "--reward", "mine.py", "--data", "rows.jsonl", "--prompt", "Q: {question}"),
        *("--columns", '{"ground_truth": "answer"}', "--reward_kwargs", "{scale: 2.0}"),
    )
    assert done.code is None, done.output
    for text in (
        "verl (verl's compute_score): it takes 'data_source'",
        "ground_truth (column answer)",
        "Q: 1+2?",
        "KeyError: 'no such thing'",
        "length: 1.000",
        "from 0.000 to 2.000; 2 different ones in 4 rows",
        "time: 3 calls",
        "one row is the same as another and was not asked about again",
        "failed: 1 of 4 rows; a run would end at the first",
    ):
        assert text in done.output, done.output


def test_check_of_async_rewards_with_no_opinion(here: Path, command: Command):
    done = command("reward", "check", "--reward", "mine.py:later", "--data", "rows.jsonl", "--num_rows", 3)
    assert done.code is None, done.output
    for text in ("on an event loop", "no opinion (None): 1 of 3 rows", "rewards/later/asked 3.000", "why: 5 letters"):
        assert text in done.output, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine.py:group",), "fits trl and verifiers_group: set convention"),
        (("mine.py:gold_in",), "the data's columns are question, answer"),
        (("rewards.squad.f1",), "Reward f1 needs the column 'answers'; the data has: question, answer"),
        (("mine.py:tokens",), "needs completion_ids, the tokens of a completion, which a file does not have"),
        (("mine.py:down",), "Reward down failed for every row: OSError: the judge is down"),
        (("mine.py:constant", "--completion", "said"), "completion='said' is no column of the data"),
        (("mine.py:constant", "--num_rows", "0"), "num_rows=0"),
        (("mine.py:constant", "--prompt", "{absent}"), "the column 'absent', which the data does not have"),
    ],
)
def test_check_refuses_in_a_line(here: Path, command: Command, words: tuple[str, ...], message: str):
    done = command("reward", "check", "--data", "rows.jsonl", "--reward", *words)
    assert isinstance(done.code, str)
    assert done.code.startswith("mezo: error: ")
    assert message.lower() in done.code.lower()
    assert "\n" not in done.code


def test_check_says_that_a_reward_is_flat(here: Path, command: Command):
    done = command("reward", "check", "--reward", "mine.py:constant", "--data", "rows.jsonl")
    assert "flat: all values are the same" in done.output
    assert done.code is None


def test_a_call_that_takes_too_long_is_ended(here: Path, command: Command):
    words = ("reward", "check", "--reward", "mine.py:forever", "--data", "rows.jsonl", "--timeout", 1)
    done = command(*words)
    assert done.code is None, done.output
    assert "in a process of its own, at most 1 s a call" in done.output
    assert "TimeoutError: no answer within 1 s" in done.output
    assert "mean 5.000" in done.output, "a check is step 0 of the run `check`"


def test_check_without_data_shows_the_convention_only(here: Path, command: Command):
    done = command("reward", "check", "--reward", "mine.py:gold_in")
    assert done.code is None, done.output
    assert "es (a function of the completion and a column" in done.output
    assert "value" not in done.output.replace("a row's value", "")


def test_check_scores_what_a_model_writes(here: Path, rows: Path, opt: Path, command: Command):
    words = ("reward", "check", "--data", rows, "--prompt", "{question}", "--model", opt, "--num_rows", 5)
    words += ("--completer", "Generate", "--completer.max_new_tokens", 6)
    done = command(*words, "--reward", "mine.py:tokens")
    assert done.code is None, done.output
    assert "completion as token ids" in done.output
    checked = check_reward(Reward("mine.py:tokens"), str(rows), "{question}", model=str(opt), num_rows=5)
    assert checked is not None
    assert len(checked.numbers) == 5
    assert len(set(checked.rows.completions)) > 1


def test_check_takes_settings_in_one_place_only(here: Path):
    with pytest.raises(ValueError, match="a Reward has its own settings"):
        check_reward(Reward("mine.py:constant"), "rows.jsonl", conversational=True)
    with pytest.raises(ValueError, match="needs prompts"):
        check_reward("mine.py:constant", model="embedded/opt-stories")


# -- rescore -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(opt: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps by rewards of three conventions, with validations."""
    folder = tmp_path_factory.mktemp("rescored")
    (folder / "mine.py").write_text(MINE)
    verl = {"function": f"{folder}/mine.py", "columns": {"ground_truth": "answer"}, "name": "verl", "timeout": 60}
    later = {
        "class_path": "mezo_lightning.rewarding.settings.Reward",
        "init_args": {"function": f"{folder}/mine.py:later"},
    }
    shaped = {"class_path": "rewards.shaping.Clip", "init_args": {"reward": "reward_examples.letters", "high": 0.5}}
    config = json.loads(write_reward_config(folder / "reward.yaml", opt, rows).read_text())
    config["model"]["objective"]["init_args"]["reward"] = ["reward_examples.letters", verl, later, shaped]
    (folder / "reward.yaml").write_text(yaml.safe_dump(config))
    done = mezo("fit", "--config", folder / "reward.yaml", "--run_dir", folder / "run")
    assert done.code is None, done.output
    return folder / "run"


def test_a_run_takes_rewards_of_any_convention(run: Path):
    for step in RunRecords(run).steps():
        assert step.metrics["rewards/verl"] == 0.0
        assert step.metrics["rewards/verl/length"] > 0.0
        assert step.metrics["rewards/later/asked"] == 4.0
        assert step.metrics["rewards/letters_2"] <= min(step.metrics["rewards/letters"], 0.5)
        total = sum(step.metrics[f"rewards/{name}"] for name in ("letters", "verl", "later", "letters_2"))
        assert step.metrics["reward"] == pytest.approx(total)


def test_what_rewards_say_of_a_completion_is_kept_with_it(run: Path):
    for sample in RunRecords(run).samples():
        letters = len(sample.completion)
        assert sample.notes == {"verl/length": letters, "later/why": f"{letters} letters"}
    assert "later/why: " in (run / "report.html").read_text()


def test_the_run_s_own_reward_says_the_same_again(run: Path, command: Command, tmp_path: Path):
    output = tmp_path / "values.jsonl"
    done = command("reward", "rescore", "--run", run, "--reward", "reward_examples.letters", "--output", output)
    assert done.code is None, done.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    samples = {(sample.step, sample.index): sample for sample in RunRecords(run).samples()}
    assert len(lines) == len(samples) > 4
    for line in lines:
        sample = samples[line["step"], line["index"]]
        assert (line["prompt"], line["completion"]) == (sample.prompt, sample.completion)
        assert line["value"] == pytest.approx(sample.metrics["rewards/letters"])


def test_another_reward_gets_the_columns_of_the_data(run: Path, command: Command, here: Path):
    done = command("reward", "rescore", "--run", run, "--reward", "mine.py:gold_in")
    assert done.code is None, done.output
    assert "'text' is the completion" in done.output
    assert "the run's own reward" in done.output


def other_run(run: Path, folder: Path, **data: str) -> Path:
    """The run again, with another configuration of the data."""
    folder.mkdir()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"] |= data
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "samples.jsonl").write_bytes((run / "samples.jsonl").read_bytes())
    return folder


def test_predictions_can_be_scored_too(run: Path, command: Command, here: Path, rows: Path):
    asked = json.loads(rows.read_text().splitlines()[3])
    lines = [
        {"index": 3, "prompt": asked["question"], "completion": completion, "metrics": {}}
        for completion in (f"I say {asked['answers'][0]}",)
    ]
    (here / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--run", other_run(run, here / "other", predict=str(rows)), "--file", here / "predictions.jsonl")
    done = command("reward", "rescore", *words, "--reward", "mine.py:gold_in", "--output", here / "values.jsonl")
    assert done.code is None, done.output
    assert json.loads((here / "values.jsonl").read_text())["value"] == 1.0


def test_rescoring_needs_the_run_s_own_data(run: Path, command: Command, here: Path):
    other = other_run(run, here / "other", prompt="Q: {question}")
    done = command("reward", "rescore", "--run", other, "--reward", "mine.py:constant")
    assert isinstance(done.code, str)
    assert "names data that is not what the run had: row 0 has another prompt" in done.code
    done = command("reward", "rescore", "--run", here, "--reward", "mine.py:constant")
    assert isinstance(done.code, str)
    assert "has no saved completions" in done.code
