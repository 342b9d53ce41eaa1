"""Prefix and prompt tuning through the command line: tuned by loss and by reward, resumed, replayed, exported."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Command, steps_of
from safetensors.torch import load_file

PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}


@pytest.mark.parametrize(("kind", "adapter", "objective", "evaluator"), [
    ("opt", PREFIX, "reward", "auto"),
    ("llama", PROMPT, "loss", "leaf_scratch"),
])  # fmt: skip
def test_tunes_resumes_and_replays(
    kind: str, adapter: dict[str, Any], objective: str, evaluator: str, command: Command,
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path,
):  # fmt: skip
    words: list[Any] = ["--model.pretrained.name", folders[kind], "--model.pretrained.adapter", json.dumps(adapter)]
    words += ["--model.evaluator", evaluator, "--trainer.max_steps", 2, "--trainer.limit_val_batches", 1]
    words += ["--model.estimator.init_args.epsilon", 1.0, "--model.optimizer.init_args.lr", 0.1]
    config = request.getfixturevalue(f"{objective}_config")
    done = command("fit", "--config", config, "--run_dir", tmp_path / "run", *words)
    assert done.code is None, done.output
    assert all(record.skipped is None for record in steps_of(tmp_path / "run"))

    parts = [*words, "--run_dir", tmp_path / "parts"]
    for more in (["--trainer.max_steps", 1], ["--ckpt_path", "last"]):
        done = command("fit", "--config", config, *parts, *more)
        assert done.code is None, done.output
    assert (tmp_path / "parts/trajectory.bin").read_bytes() == (tmp_path / "run/trajectory.bin").read_bytes()

    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "replayed")
    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "base", "--steps", 0)
    checkpoint = tmp_path / "parts/checkpoints/last.ckpt"
    command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("replayed", "exported", "base")]
    assert files[0].read_bytes() == files[1].read_bytes()
    tuned, base = load_file(files[0]), load_file(files[2])
    assert tuned.keys() == base.keys() == {"prompt_embeddings"}
    assert not tuned["prompt_embeddings"].equal(base["prompt_embeddings"])
    written = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(folders[kind])
