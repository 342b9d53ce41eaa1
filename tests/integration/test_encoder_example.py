"""The encoder example: a masked language model from nothing, tuned, replayed and exported by the command line."""

import importlib
from pathlib import Path

import pytest
import torch
from helpers import Command, steps_of
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "encoder.yaml"
LORA = '{"peft_type": "LORA", "r": 2, "target_modules": ["query", "value"]}'


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's model after a short pre-training."""
    folder = tmp_path_factory.mktemp("encoder")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(ROOT / "examples"))
    with torch.random.fork_rng(devices=[]):
        importlib.import_module("encoder").main(["--output", str(folder), "--steps", "30"])
    patch.undo()
    return folder


BY_LOSS = ["--model.objective", "CrossEntropy", "--checkpoint.monitor", "val/accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "others"), [("null", []), (LORA, BY_LOSS)], ids=["all weights by accuracy", "lora by loss"]
)
def test_tunes_replays_and_exports(
    encoder: Path, adapter: str, others: list[str], command: Command, tmp_path: Path
) -> None:
    words = ["--model.pretrained.name", encoder, "--model.pretrained.adapter", adapter, "--data.num_validation", 20]
    words += ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2, *others]
    done = command("fit", "--config", CONFIG, "--run_dir", tmp_path / "run", *words)
    assert done.code is None, done.output
    assert [record.skipped for record in steps_of(tmp_path / "run")] == [None] * 2

    done = command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "replayed")
    assert done.code is None, done.output
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    done = command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    assert done.code is None, done.output
    files = [tmp_path / name / "model.safetensors" for name in ("replayed", "exported")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tuned, base = load_file(files[0]), load_file(encoder / "model.safetensors")
    assert tuned.keys() == base.keys()
    changed = {name for name in base if not base[name].equal(tuned[name])}
    if adapter == LORA:
        assert {name.split(".")[-2] for name in changed} == {"query", "value"}
    else:
        assert len(changed) > 0.8 * len(base)

    model = AutoModelForMaskedLM.from_pretrained(tmp_path / "exported")
    assert model.config.architectures == ["RobertaForMaskedLM"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer("Where did Ella go? It was <mask>.", return_tensors="pt")
    assert torch.isfinite(model(input_ids=ids["input_ids"]).logits).all()


def test_without_its_kind_it_is_refused(encoder: Path, command: Command, tmp_path: Path) -> None:
    words = ["--model.pretrained.name", encoder, "--model.pretrained.kind", "causal", "--run_dir", tmp_path / "run"]
    done = command("fit", "--config", CONFIG, *words)
    assert "set model.pretrained.kind: masked" in f"{done.code}{done.output}"


def test_a_prompt_without_a_mask_is_refused_by_row(encoder: Path, command: Command, tmp_path: Path) -> None:
    words = ["--model.pretrained.name", encoder, "--data.prompt", "{question}", "--run_dir", tmp_path / "run"]
    done = command("fit", "--config", CONFIG, *words)
    assert "row 0: the prompt" in f"{done.code}{done.output}"
    assert "holds no masks" in f"{done.code}{done.output}"
