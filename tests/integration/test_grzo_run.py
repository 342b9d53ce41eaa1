"""A direction for each row, in real runs: from YAML, by loss and by reward, resumed and replayed; or refused."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    Command,
    Watch,
    assert_same,
    data_of,
    model_of,
    module_of,
    replayed,
    reward_of,
    steps_of,
    steps_taken,
    trainer_of,
    weights,
)
from reward_examples import letters
from transformers import AutoModelForCausalLM

from mezo_lightning import GRZO, Flipout, MeZO
from mezo_lightning.reporting.records import RunRecords

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}
PRECISIONS: Any = list(DTYPES)


def grzo(opt: Path, objective: Any = None, **arguments: Any) -> Any:
    usual = {"optimizer": functools.partial(MeZO, lr=1e-4, sampler=Flipout()), "estimator": GRZO(1e-2)}
    return module_of(opt, objective, **(usual | arguments))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_trains_resumes_and_replays_to_the_same_bytes(precision: Any, tmp_path: Path, opt: Path, rows: Path):
    whole, start, rest = grzo(opt), grzo(opt), grzo(opt)
    trainer_of(tmp_path / "whole", 4, precision=precision).fit(whole, data_of(rows))
    tuned = weights(model_of(whole))
    assert_same(weights(replayed(tmp_path / "whole", opt, DTYPES[precision])), tuned)
    assert [len(step.terms) for step in steps_taken(tmp_path / "whole")] == [4] * 4
    trainer = trainer_of(tmp_path / "parts", 2, precision=precision)
    trainer.fit(start, data_of(rows))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer_of(tmp_path / "parts", 4, precision=precision)
    again.fit(rest, data_of(rows), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert_same(weights(model_of(rest)), tuned)
    assert (tmp_path / "parts/trajectory.bin").read_bytes() == (tmp_path / "whole/trajectory.bin").read_bytes()


def test_by_reward_of_what_each_row_writes(tmp_path: Path, opt: Path, rows: Path):
    module, watch = grzo(opt, reward_of(letters), estimator=GRZO(0.1)), Watch()
    trainer_of(tmp_path, 4, callbacks=[watch]).fit(module, data_of(rows))
    taken = [record for record in watch.records if record.skipped is None]
    assert any(len(set(record.projected_grads)) > 2 for record in taken)
    assert_same(weights(replayed(tmp_path, opt)), weights(model_of(module)))


def test_another_sampler_and_weights_that_are_cut_up_are_refused_before_a_model_is_loaded(tmp_path: Path, rows: Path):
    nowhere = Path("/nowhere/model")
    with pytest.raises(ValueError, match=r"estimator=GRZO .* with sampler=Gaussian\(\) .*`sampler: Flipout`"):
        grzo(nowhere, optimizer=functools.partial(MeZO, lr=1e-4))
    trainer = trainer_of(tmp_path, 4, strategy="zero3_inference", devices=1)
    with pytest.raises(ValueError, match=r"strategy=zero3_inference cannot be used with estimator=GRZO, .* replicated"):
        trainer.fit(grzo(nowhere), data_of(rows))


@pytest.mark.slow
def test_from_yaml_alone_it_lowers_the_loss_of_the_embedded_model(tmp_path: Path, command: Command):
    config, run = tmp_path / "run.yaml", tmp_path / "run"
    config.write_text(
        """
model:
  pretrained: {name: embedded/opt-stories, trainable: bias|layer_norm}
  estimator: {class_path: GRZO, init_args: {epsilon: 1.0e-2}}
  objective: {class_path: CrossEntropy}
  optimizer: {class_path: MeZO, init_args: {lr: 3.0e-4, sampler: {class_path: Flipout}}}
data:
  train: embedded/stories/train.jsonl
  validation: embedded/stories/validation.jsonl
  num_validation: 16
  prompt: "Story: {story}\\nQuestion: {question}\\nAnswer:"
  target: " {answers[0]}\\n"
  batch_size: 8
  validation_batch_size: 16
trainer: {max_steps: 10, val_check_interval: 10, accelerator: cpu, enable_progress_bar: false}
"""
    )
    assert command("fit", "--config", config, "--run_dir", run).code is None
    before, after = (validation.metrics["loss"] for validation in RunRecords(run).validations())
    assert after < 0.8 * before
    assert all(len(record.projected_grads) == 8 for record in steps_of(run))
    assert command("replay", "--trajectory", run, "--output", tmp_path / "replayed").code is None
    checkpoint = run / "checkpoints" / "last.ckpt"
    assert command("export", "--checkpoint", checkpoint, "--output", tmp_path / "exported").code is None
    rebuilt, exported = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("replayed", "exported"))
    assert_same(weights(rebuilt), weights(exported))
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
