"""Updates with a memory, and decay towards the start, in real runs: from YAML, resumed, replayed, sharded."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import (
    EPSILON,
    Command,
    assert_same,
    data_of,
    model_of,
    module_of,
    replayed,
    steps_taken,
    trainer_of,
    weights,
)
from jobs import run_job, succeeded
from transformers import AutoModelForCausalLM

from mezo_lightning import CentralDifference, DenseAdam, DenseMomentum, LowRank, MeZO, Momentum, ScalarAdam

ANCHORED = {"weight_decay": 100.0, "decay_towards": "start"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "momentum": ("32-true", {"update": Momentum(0.8, 3)}),
    "scalar adam": ("bf16-true", {"update": ScalarAdam(0.5, window=3), "rounding": "compensated"}),
    "decay towards the start": ("bf16-true", ANCHORED),
    "both": ("32-true", ANCHORED | {"update": Momentum(0.8, 3)}),
    "dense": ("bf16-true", {"update": DenseMomentum()}),
}
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


@pytest.mark.parametrize("case", CASES)
def test_trains_resumes_and_replays_to_the_same_bytes(case: str, tmp_path: Path, opt: Path, rows: Path):
    precision, options = CASES[case]

    def module() -> Any:
        return module_of(opt, optimizer=functools.partial(MeZO, lr=1e-3, **options))

    whole, start, rest = module(), module(), module()
    trainer_of(tmp_path / "whole", 6, precision=precision).fit(whole, data_of(rows))
    tuned = weights(model_of(whole))
    assert_same(weights(replayed(tmp_path / "whole", opt, DTYPES[precision])), tuned)
    trainer = trainer_of(tmp_path / "parts", 3, precision=precision)
    trainer.fit(start, data_of(rows))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    again = trainer_of(tmp_path / "parts", 6, precision=precision)
    again.fit(rest, data_of(rows), ckpt_path=str(tmp_path / "half.ckpt"), weights_only=True)
    assert_same(weights(model_of(rest)), tuned)
    assert (tmp_path / "parts/trajectory.bin").read_bytes() == (tmp_path / "whole/trajectory.bin").read_bytes()
    terms = [len(step.terms) for step in steps_taken(tmp_path / "whole")]
    assert terms == ([1, 2, 3, 3, 3, 3] if case not in ("decay towards the start", "dense") else [1] * 6)


def test_from_yaml_alone(tmp_path: Path, loss_config: Path, command: Command):
    """Stopped after two steps and taken up again, then rebuilt by `mezo replay`, which has one weight at a time."""
    update = {"class_path": "ScalarAdam", "init_args": {"beta1": 0.5, "window": 3}}
    overlay = {"lr": 1e-3, "update": update, **ANCHORED}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"init_args": overlay}}}))
    words = ["fit", "--config", loss_config, "--config", tmp_path / "overlay.yaml"]
    for run, more in (
        ("whole", []),
        ("parts", ["--trainer.max_steps", 2]),
        ("parts", ["--ckpt_path", "last"]),
    ):
        outcome = command(*words, "--run_dir", tmp_path / run, *more)
        assert outcome.code is None, outcome.output
    assert (tmp_path / "parts/trajectory.bin").read_bytes() == (tmp_path / "whole/trajectory.bin").read_bytes()
    assert [len(step.terms) for step in steps_taken(tmp_path / "whole")] == [1, 2, 3, 3]
    for name, words in (
        ("replayed", ["replay", "--trajectory", tmp_path / "whole"]),
        ("exported", ["export", "--checkpoint", tmp_path / "parts/checkpoints/last.ckpt"]),
    ):
        outcome = command(*words, "--output", tmp_path / name)
        assert outcome.code is None, outcome.output
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("replayed", "exported")]
    assert_same(weights(models[0]), weights(models[1]))


def test_the_command_line_explains_and_refuses(tmp_path: Path, loss_config: Path, command: Command):
    help_ = command("fit", "--model.optimizer.init_args.update.help", "Momentum")
    assert "Steps that an estimate stays in the sum" in help_.output
    options = {
        "update": {"class_path": "Momentum"},
        "sampler": {"class_path": "LowRank", "init_args": {"refresh_right": 5}},
    }
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"model": {"optimizer": {"init_args": options}}}))
    outcome = command(
        "fit", "--config", loss_config, "--config", tmp_path / "overlay.yaml", "--run_dir", tmp_path / "r"
    )
    assert "a seed gives other ones by then: use G" in str(outcome.code)
    assert not (tmp_path / "r").exists()


def test_a_run_that_was_cut_off_between_checkpoints_measures_its_last_steps_anew(tmp_path: Path, opt: Path, rows: Path):
    """The log has steps that the checkpoint lacks, and of their estimates nothing but the steps."""

    def module(**arguments: Any) -> Any:
        return module_of(opt, optimizer=functools.partial(MeZO, lr=1e-3, update=Momentum(0.8, 3)), **arguments)

    run, whole = tmp_path / "run", tmp_path / "whole"
    trainer_of(whole, 6).fit(complete := module(), data_of(rows))
    for steps, last in ((3, False), (5, True)):
        trainer = trainer_of(run, steps)
        trainer.fit(module(), data_of(rows), ckpt_path=str(tmp_path / "3.ckpt") if last else None, weights_only=True)
        if not last:
            trainer.save_checkpoint(tmp_path / "3.ckpt")
    trainer_of(run, 6).fit(rest := module(), data_of(rows), ckpt_path=str(tmp_path / "3.ckpt"), weights_only=True)
    assert_same(weights(model_of(rest)), weights(model_of(complete)))
    assert (run / "trajectory.bin").read_bytes() == (whole / "trajectory.bin").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [ANCHORED | {"update": Momentum(0.8, 3), "sampler": LowRank(1, "identity", 0, None)}, {"update": DenseAdam()}],
    ids=["momentum", "dense adam"],
)
def test_two_processes_with_shards_make_the_run_of_one_with_two_micro_batches(
    options: dict[str, Any], tmp_path: Path, opt: Path, rows: Path
):
    """They are stopped after three steps, and others go on."""
    optimizer = functools.partial(MeZO, lr=1e-3, **options)
    estimator = CentralDifference(EPSILON, num_queries=2)
    calm = module_of(opt, optimizer=optimizer, estimator=estimator, micro_batch_size=2)
    trainer_of(tmp_path / "calm", 6).fit(calm, data_of(rows, num_validation=5))
    run = tmp_path / "run"
    common = {"model": opt, "rows": rows, "run": run, "every": 3, "optimizer": optimizer, "estimator": estimator}
    succeeded(run_job("saving_fit", 2, tmp_path / "a", **common, strategy="layer", steps=3))
    ranks = succeeded(run_job("saving_fit", 2, tmp_path / "b", **common, strategy="whole", steps=6, ckpt_path="last"))
    for name, parameter in model_of(calm).named_parameters():
        joined = torch.cat([rank["held"][name][0] for rank in ranks])
        assert torch.equal(joined, parameter.detach().reshape(-1)), name
    assert (run / "trajectory.bin").read_bytes() == (tmp_path / "calm/trajectory.bin").read_bytes()
