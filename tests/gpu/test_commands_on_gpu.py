"""`mezo fit` on a GPU, resumed, replayed on the CPU, and with sharded weights over NCCL."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_helpers import DEVICE, NEEDS_CUDA, same
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.trajectory import Trajectory

pytestmark = [*NEEDS_CUDA, pytest.mark.slow]

ACCELERATOR = "cuda"
GENERATE = {"class_path": "Generate", "init_args": {"max_new_tokens": 6}}
VOWEL = {"class_path": "rewards.text.Matches", "init_args": {"pattern": "[aeiou]", "whole": False}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "loss": {"class_path": "CrossEntropy"},
    "reward": {"class_path": "RewardObjective", "init_args": {"reward": VOWEL, "completer": GENERATE}},
}


def mezo(*words: Any) -> str:
    """The command `mezo`, in a process of its own; what it wrote."""
    command = [sys.executable, "-m", "mezo_lightning", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Tokenizer, make_model: Any) -> Path:
    """The folder of a tiny OPT."""
    folder = tmp_path_factory.mktemp("opt")
    make_model("opt").save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_file, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


def write_config(folder: Path, base: Path, objective: str) -> Path:
    """A configuration of four steps in bf16."""
    places = ["mill", "river", "garden", "old mill by the river"]
    rows = folder / "rows.jsonl"
    lines = [json.dumps({"question": f"Where is {i}?", "answer": f" the {places[i % 4]}"}) + "\n" for i in range(24)]
    rows.write_text("".join(lines))
    config = {
        "model": {
            "pretrained": {"name": str(base)},
            "objective": OBJECTIVES[objective],
            "estimator": {"class_path": "CentralDifference", "init_args": {"epsilon": 3e-2}},
            "optimizer": {"class_path": "MeZO", "init_args": {"lr": 1e-3, "rounding": "compensated"}},
        },
        "data": {
            "train": str(rows), "prompt": "{question}", "target": "{answer}", "num_validation": 4, "batch_size": 4,
        },
        "trainer": {
            "max_steps": 4, "val_check_interval": 2, "enable_progress_bar": False, "precision": "bf16-true",
            "accelerator": ACCELERATOR, "devices": 1,
        },
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    return path


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters())


def assert_replays_to_its_checkpoint(run: Path, base: Path) -> None:
    """Replayed on the CPU, the run's trajectory gives the weights that its last checkpoint holds."""
    mezo("replay", "--trajectory", run, "--output", run / "replayed")
    mezo("export", "--checkpoint", run / "checkpoints/last.ckpt", "--output", run / "exported")
    replayed, exported, before = (weights(folder) for folder in (run / "replayed", run / "exported", base))
    assert replayed.keys() == exported.keys() == before.keys()
    assert not [name for name in replayed if not same(replayed[name], exported[name])]
    assert any(not same(replayed[name], before[name]) for name in replayed)


@pytest.mark.parametrize("adapter", [None, {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]}])
def test_a_model_starts_alike_where_lightning_makes_the_gpu_the_default(adapter: dict[str, Any] | None, base: Path):
    """Else a run on a GPU would start from other adapters than its replay on the CPU."""
    if adapter is not None:
        pytest.importorskip("peft")
    pretrained = Pretrained(str(base), adapter=adapter)
    plain = dict(pretrained.load(torch.bfloat16).named_parameters())
    with DEVICE:
        loaded = dict(pretrained.load(torch.bfloat16).named_parameters())
    assert loaded.keys() == plain.keys()
    assert not [name for name in plain if not same(loaded[name], plain[name])]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fit_resume_and_replay_on_the_cpu(objective: str, base: Path, tmp_path: Path):
    config = write_config(tmp_path, base, objective)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    mezo("fit", "--config", config, "--run_dir", whole)
    info = RunRecords(whole).info()
    assert info is not None
    assert (info.status, info.steps, info.dtype) == ("finished", 4, "bfloat16")
    assert info.device == torch.cuda.get_device_name()
    assert_replays_to_its_checkpoint(whole, base)
    mezo("fit", "--config", config, "--run_dir", parts, "--trainer.max_steps", 2)
    mezo("fit", "--config", config, "--run_dir", parts, "--ckpt_path", "last")
    assert (parts / "trajectory.bin").read_bytes() == (whole / "trajectory.bin").read_bytes()


@pytest.mark.parametrize("gather", ["layer", "whole"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_sharded_weights_of_one_rank_over_nccl(objective: str, gather: str, base: Path, tmp_path: Path):
    strategy = {"class_path": "mezo_lightning.strategies.ZeRO3Strategy", "init_args": {"gather": gather}}
    config, run = write_config(tmp_path, base, objective), tmp_path / "run"
    mezo("fit", "--config", config, "--run_dir", run, "--trainer.strategy", json.dumps(strategy))
    with Trajectory.open(run) as trajectory:
        assert len(trajectory) == 4
    assert_replays_to_its_checkpoint(run, base)
