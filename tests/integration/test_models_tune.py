"""GPT-2, Llama, OPT and a LoRA on OPT are tuned by loss and by reward through the command line, and replayed."""

from pathlib import Path
from typing import Any

import pytest
from helpers import Command, steps_of, steps_taken
from safetensors.torch import load_file

LORA = '{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}'


@pytest.mark.parametrize(("kind", "objective", "evaluator"), [
    ("opt", "loss", "copy"),
    ("opt", "reward", "leaf_scratch"),
    ("gpt2", "loss", "auto"),
    ("gpt2", "reward", "auto"),
    ("llama", "loss", "leaf_scratch"),
    ("llama", "reward", "copy"),
    ("lora", "loss", "leaf_scratch"),
    ("lora", "loss", "auto"),
    ("lora", "reward", "auto"),
])  # fmt: skip
def test_tunes_and_replays(
    kind: str, objective: str, evaluator: str, command: Command, request: pytest.FixtureRequest,
    folders: dict[str, Path], tmp_path: Path,
):  # fmt: skip
    words: list[Any] = ["--model.pretrained.name", folders["opt" if kind == "lora" else kind]]
    words += ["--model.pretrained.adapter", LORA] if kind == "lora" else []
    words += ["--model.optimizer.init_args.weight_decay", 0.1, "--model.evaluator", evaluator, "--trainer.max_steps", 2]
    words += ["--trainer.limit_val_batches", 0]
    config = request.getfixturevalue(f"{objective}_config")
    done = command("fit", "--config", config, "--run_dir", tmp_path / "run", *words)
    assert done.code is None, done.output
    assert all(record.skipped is None for record in steps_of(tmp_path / "run"))
    taken = steps_taken(tmp_path / "run")
    groups = 1 if kind == "lora" else 2  # an adapter has no biases
    assert [len(step.decays) for step in taken] == [groups] * 2
    assert taken[0].decays[0] == pytest.approx(1e-3 * 0.1)
    assert groups == 1 or taken[0].decays[1] == 0

    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "replayed")
    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "base", "--steps", 0)
    checkpoint = tmp_path / "run/checkpoints/last.ckpt"
    command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    files = [tmp_path / name / "model.safetensors" for name in ("replayed", "exported", "base")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tuned, base = load_file(files[0]), load_file(files[2])
    changed = {name for name in base if not base[name].equal(tuned[name])}
    if kind == "lora":
        assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    else:
        assert len(changed) > 0.8 * len(base)
