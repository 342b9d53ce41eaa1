"""What the README and the pages on Lightning and data say exists, parses and runs."""

import re
import runpy
import textwrap
from pathlib import Path

import pytest
import torch
import yaml

from mezo_lightning.cli import main
from mezo_lightning.data import PromptDataModule

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str) -> list[str]:
    """The fenced blocks in that language."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def block(language: str, containing: str) -> str:
    """The first of them in the README that has a text in it."""
    return next(code for code in blocks(language, TEXT) if containing in code)


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))])
def test_every_link_leads_somewhere(name: str) -> None:
    for target, part in re.findall(r"\]\(([^)#]+)(#[^)]+)?\)", (ROOT / name).read_text(encoding="utf-8")):
        path = (ROOT / name).parent / target
        assert target.startswith("https://") or path.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
            assert part[1:] in [heading.lower().replace(" ", "-") for heading in headings], target + part


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


# -- docs/lightning.md and docs/data.md --------------------------------------------------------------------------------


def test_the_page_on_lightning_shows_what_the_example_does() -> None:
    [shown] = blocks("python", page("lightning.md"))
    assert textwrap.indent(shown, "    ") in (ROOT / "examples" / "trainer.py").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_trainer_example_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path / "run"))
    folder = Path(runpy.run_path(str(ROOT / "examples" / "trainer.py"))["main"](steps=1, rows=4))
    assert '"step": 1' in (folder / "validation.jsonl").read_text(encoding="utf-8")
    assert (folder / "report.html").exists()


def test_the_files_of_a_run_are_called_as_the_page_says() -> None:
    from mezo_lightning.commands.predictions import FILE
    from mezo_lightning.reporting.records import FILES, INFO_FILE

    for name in (*FILES.values(), INFO_FILE, FILE):
        assert f"`{name}`" in page("lightning.md")


def test_the_page_on_data_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    [code] = blocks("python", page("data.md"))
    exec(code, {})
    prompts, targets = capsys.readouterr().out.splitlines()
    assert re.match(r"\('Question: [^']+\?\\nAnswer:', ", prompts)  # the space at the end is gone
    assert re.match(r"\(' [^']+\\n', ", targets)  # the one at the beginning is not


@pytest.mark.parametrize("text", blocks("yaml", page("data.md")))
def test_the_yaml_of_the_page_on_data_makes_a_data_module(text: str) -> None:
    data = PromptDataModule(**yaml.safe_load(text)["data"])
    if data.sources["train"].startswith("embedded/"):
        data.setup()
        assert [len(data.splits[name]) for name in ("validation", "test")] == [200, 100]
