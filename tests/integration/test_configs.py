"""Every YAML in configs/ and in docs/rewards.md is parsed by the real command line, and the page's commands are run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import Command, Outcome
from jsonargparse import ArgumentParser

from mezo_lightning.cli import main
from mezo_lightning.objectives import Objective, PreferenceObjective, RewardObjective

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGE = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")
BLOCKS = [yaml.safe_load(text) for text in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
COMMANDS = re.findall(r"^    (mezo .+)", PAGE, re.MULTILINE)


def command_of(config: Path) -> list[str]:
    """The words after `mezo` in the command on the file's first line."""
    first = config.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# mezo fit --config configs/"), f"{config.name} must begin with its command"
    return shlex.split(first.removeprefix("# mezo "))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_config_is_parsed(config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    command = command_of(config)
    assert f"configs/{config.name}" in command
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--print_config"])
    assert not stopped.value.code
    assert "class_path: mezo_lightning" in capsys.readouterr().out


# -- docs/rewards.md ---------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page takes for granted: the examples, a fitted scorer, keys."""
    for name in ("examples", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    scorer = tmp_path / "runs" / "scorer"
    scorer.mkdir(parents=True)
    (scorer / "scorer.safetensors").touch()
    encoder = str(ROOT / "mezo_lightning" / "assets" / "opt-stories")
    settings = {"encoder": encoder, "revision": None, "dtype": "float32", "max_length": None}
    (scorer / "scorer.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("SCORES_KEY", "JUDGE_KEY"):
        monkeypatch.setenv(name, "secret")
    return tmp_path


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(block))
@pytest.mark.usefixtures("here")
def test_what_the_page_shows_makes_an_objective(block: dict[str, Any]) -> None:
    kind = PreferenceObjective if "oracle" in block else RewardObjective
    objective = {"class_path": kind.__name__, "init_args": block}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--objective", type=Objective)
    settings = parser.parse_object({"objective": block["model"]["objective"] if "model" in block else objective})
    assert isinstance(parser.instantiate_classes(settings).objective, (PreferenceObjective, RewardObjective))


@pytest.mark.parametrize("block", [block for block in BLOCKS if "model" in block], ids=str)
def test_whole_configurations_of_the_page_are_overlays(block: dict[str, Any], here: Path, command: Command) -> None:
    (here / "run.yaml").write_text(yaml.safe_dump(block))
    done = command("fit", "--config", "configs/quickstart.yaml", "--config", "run.yaml", "--print_config")
    assert not done.code
    assert block["model"]["objective"]["class_path"] in done.output


@pytest.mark.parametrize("line", [line for line in COMMANDS if "reward check" in line])
@pytest.mark.usefixtures("here")
def test_checks_of_the_page_are_done(line: str, command: Command) -> None:
    done = command(*shlex.split(line)[1:])
    assert done.code is None, done.output
    assert "convention  trl" in done.output
    assert "in 8 rows" in done.output
    assert "empty completions" not in done.output


def reward_in(done: Outcome) -> Any:
    assert not done.code, done.output
    return yaml.safe_load(done.output)["model"]["objective"]["init_args"]["reward"]


def test_one_setting_of_a_reward_is_changed_as_the_page_says(here: Path, command: Command) -> None:
    [line] = [line for line in COMMANDS if "rows_per_request" in line]
    words = shlex.split(line)[1:]
    by_json = reward_in(command(*words, "--print_config"))["init_args"]
    overlay = {"model": {"objective": {"init_args": {"reward": {"init_args": {"rows_per_request": 4}}}}}}
    (here / "more.yaml").write_text(yaml.safe_dump(overlay))
    by_overlay = reward_in(command(*words[:-2], "--config", "more.yaml", "--print_config"))["init_args"]
    assert by_json == by_overlay
    assert (by_json["rows_per_request"], by_json["labels"]) == (4, "answers")


@pytest.mark.parametrize(
    "given",
    [
        "init_args.rows_per_request=4",
        "init_args.rows_per_request 4",
        'init_args={"rows_per_request":4}',
        "rows_per_request=4",
    ],
)
def test_a_dotted_name_that_would_lose_the_other_settings_of_a_reward_is_refused(given: str, command: Command) -> None:
    configs = [f"--config={ROOT / 'configs' / name}" for name in ("quickstart.yaml", "reward-http.yaml")]
    done = command("fit", *configs, *f"--model.objective.init_args.reward.{given}".split())
    assert f"reward.{re.split('[ =]', given)[0]} would put the reward's other settings back to their" in str(done.code)


def test_a_dotted_name_keeps_the_other_settings_of_an_oracle_and_of_a_function(here: Path, command: Command) -> None:
    objective = "--model.objective.init_args"
    configs = [f"--config=configs/{name}" for name in ("quickstart.yaml", "preference-person.yaml")]
    done = command("fit", *configs, f"{objective}.oracle.init_args.overlap=2", "--print_config")
    oracle = yaml.safe_load(done.output)["model"]["objective"]["init_args"]["oracle"]["init_args"]
    assert (oracle["overlap"], oracle["store"]) == (2, "runs/votes.sqlite")
    overlay = {"model": {"objective": {"init_args": {"reward": {"function": "rewards.squad.f1", "name": "mine"}}}}}
    (here / "more.yaml").write_text(yaml.safe_dump(overlay))
    words = ("--config=configs/quickstart.yaml", "--config=more.yaml", f"{objective}.reward.timeout=5")
    reward = reward_in(command("fit", *words, "--print_config"))
    assert (reward["timeout"], reward["name"], reward["function"]) == (5.0, "mine", "rewards.squad.f1")


@pytest.mark.parametrize("page", ["docs/rewards.md", "docs/parameter-spaces.md", "examples/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()] == []
    headings = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)", text)) <= headings


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.num_validation", "20"]
    main(["fit", "--config", "configs/quickstart.yaml", "--run_dir", str(tmp_path / "run"), *few])
    assert "F1" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "overlay", ["quickstart-lora", "quickstart-prefix", "quickstart-4bit", "quickstart-qzo", "quickstart-qzo-8bit"]
)
def test_the_quickstart_runs_in_other_parameter_spaces(
    overlay: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    configs = ["--config", "configs/quickstart.yaml", "--config", f"configs/{overlay}.yaml"]
    few = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.num_validation", "4"]
    main(["fit", *configs, "--run_dir", str(tmp_path / "run"), *few, "--data.batch_size", "8"])
    assert '"step": 1' in (tmp_path / "run" / "validation.jsonl").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_reward_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split((ROOT / "examples" / "my_reward.py").read_text(encoding="utf-8").splitlines()[2])
    assert words[0] == "mezo"
    few = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.num_validation", "8"]
    main([*words[1:], "--run_dir", str(tmp_path / "run"), *few])
    assert "right_and_brief" in (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8")
