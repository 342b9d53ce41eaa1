"""Runs of several processes that are stopped, killed and taken up again, on as many processes or on others."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import run_job, succeeded

from mezo_lightning import MeZO, Sparse, Trajectory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def common(opt: Path, rows: Path) -> dict[str, Any]:
    return {"model": opt, "rows": rows, "every": 3, "startup_checks": False}


def whole(ranks: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([rank["held"][name][0] for rank in ranks]) for name in ranks[0]["held"]}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "case",
    [
        {"strategy": "layer", "reward": "jobs.length"},
        {
            "strategy": "whole",
            "precision": "bf16-true",
            "optimizer": partial(MeZO, lr=1e-2, rounding="compensated", sampler=Sparse()),
        },
    ],
    ids=["layer", "whole, compensated, sparse"],
)
def test_a_rank_that_is_killed_ends_the_job_and_the_resumed_run_ends_the_same(
    common: dict[str, Any], tmp_path: Path, case: dict[str, Any]
):
    common = common | case | {"steps": 9, "strategy_arguments": {"timeout": 10.0}}
    calm = whole(succeeded(run_job("saving_fit", 2, tmp_path / "calm", run=tmp_path / "calm", **common)))
    run = tmp_path / "killed"
    for number, kill in enumerate([(0, 4), (1, 8)]):
        last = {"ckpt_path": "last"} if number else {}
        results = run_job("saving_fit", 2, tmp_path / f"job{number}", run=run, kill=kill, **common, **last)
        victim, survivor = results[kill[0]], results[1 - kill[0]]
        assert victim.code == -9
        assert survivor.code not in (0, None)
        assert f"rank {kill[0]}" in survivor.error, survivor.error[-2000:]
    resumed = succeeded(run_job("saving_fit", 2, tmp_path / "job", run=run, ckpt_path="last", **common))
    assert same(whole(resumed), calm)
    # Steps that the log had beyond the checkpoint were repeated from it; the log is that of the undisturbed run.
    assert (run / "trajectory.bin").read_bytes() == (tmp_path / "calm" / "trajectory.bin").read_bytes()


def test_one_two_and_one_process_take_turns(common: dict[str, Any], tmp_path: Path):
    run = tmp_path / "run"
    common = common | {"run": run}
    one = {"strategy": "one", "micro_batch_size": 2}
    succeeded(run_job("saving_fit", 1, tmp_path / "a", **common, **one, steps=3))
    succeeded(run_job("saving_fit", 2, tmp_path / "b", **common, strategy="layer", steps=6, ckpt_path="last"))
    final = whole(succeeded(run_job("saving_fit", 1, tmp_path / "c", **common, **one, steps=9, ckpt_path="last")))
    # Each resume has compared the fingerprint of what it read with that of what was saved. The shares of two processes
    # are the micro-batches of one, so even the steps are the same.
    calm = run_job("saving_fit", 1, tmp_path / "d", **(common | {"run": tmp_path / "calm"}), **one, steps=9)
    assert same(final, whole(succeeded(calm)))


def test_a_sharded_checkpoint_is_loaded_validated_and_exported_by_one_process(
    common: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    from mezo_lightning import MeZOModule
    from mezo_lightning.commands.rebuild import export_checkpoint, replay_run

    run = tmp_path / "run"
    tuned = whole(succeeded(run_job("saving_fit", 2, tmp_path / "a", **common, run=run, strategy="layer", steps=3)))
    checkpoint = run / "checkpoints" / "last.ckpt"
    module = MeZOModule.load_from_checkpoint(checkpoint)
    assert module.model is not None
    export_checkpoint(checkpoint, tmp_path / "exported")
    replay_run(run, tmp_path / "replayed")
    models = [
        module.model,
        *(AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("exported", "replayed")),
    ]
    for model in models:
        found = {name: parameter.detach().reshape(-1) for name, parameter in model.named_parameters()}
        assert same(found, tuned)


def test_the_log_is_rewound_if_asked_for(common: dict[str, Any], tmp_path: Path):
    run = tmp_path / "run"
    common = common | {"run": run, "strategy": "replicated"}
    succeeded(run_job("saving_fit", 2, tmp_path / "a", **common, steps=7))
    arguments = common | {"ckpt_path": str(run / "checkpoints" / "last.ckpt"), "seed": 7}
    before = (run / "trajectory.bin").read_bytes()
    succeeded(run_job("saving_fit", 2, tmp_path / "b", **arguments, steps=7, rewind=True))
    with Trajectory.open(run) as trajectory:
        assert len(trajectory) == 7
    after = (run / "trajectory.bin").read_bytes()
    assert after != before
    assert len(after) == len(before)
