"""Every YAML in configs/ is parsed by the real command line, as its first line says that it is used."""

import shlex
from pathlib import Path

import pytest

from mezo_lightning.cli import main

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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


@pytest.mark.slow
def test_the_quickstart_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    few = ["--trainer.max_steps", "2", "--trainer.val_check_interval", "2", "--data.num_validation", "20"]
    main(["fit", "--config", "configs/quickstart.yaml", "--run_dir", str(tmp_path / "run"), *few])
    assert "F1" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_reward_of_ones_own_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split((ROOT / "examples" / "my_reward.py").read_text(encoding="utf-8").splitlines()[2])
    assert words[0] == "mezo"
    few = ["--trainer.max_steps", "1", "--trainer.val_check_interval", "1", "--data.num_validation", "8"]
    main([*words[1:], "--run_dir", str(tmp_path / "run"), *few])
    assert "right_and_brief" in (tmp_path / "run" / "steps.jsonl").read_text(encoding="utf-8")
