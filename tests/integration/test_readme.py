"""What the README says exists, parses and runs."""

import re
import runpy
from pathlib import Path

import pytest
import torch

from mezo_lightning.cli import main

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str, containing: str) -> str:
    """The first fenced block in that language that has a text in it."""
    return next(code for code in re.findall(rf"```{language}\n(.*?)```", TEXT, re.S) if containing in code)


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_two_commands_are_make_targets() -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert {"demo", "test", "setup", "smollm2"} <= set(targets)


def test_the_shortest_yaml_is_parsed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(block("yaml", "pretrained"), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(config), "--print_config"])
    assert not stopped.value.code
    assert "rewards.squad.f1" in capsys.readouterr().out


def test_the_reward_in_the_readme_works() -> None:
    names: dict = {}
    exec(block("python", "def right_and_brief"), names)
    assert names["right_and_brief"](["a red ball"], answers=[["red"]], prompts=["?"]) == [pytest.approx(0.9)]


def test_the_loop_in_the_readme_tunes() -> None:
    import mezo_lightning

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(64, 4)

    def loss(module: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return (module(batch)[:, 0] - batch.sum(-1)) ** 2

    names = {name: getattr(mezo_lightning, name) for name in ("MeZO", "LeafScratch", "CentralDifference")}
    code = block("python", "optimizer = MeZO").replace("lr=1e-6", "lr=1e-2")
    before = loss(model, inputs).mean().item()
    exec(code, {**names, "model": model, "batches": [inputs] * 300, "loss": loss})
    assert loss(model, inputs).mean().item() < before / 4


@pytest.mark.slow
def test_the_plain_example_learns_and_replays(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "plain_pytorch.py"))["main"](steps=20)
    assert "weights are identical" in capsys.readouterr().out
