"""Several processes: the same steps and the same weights as one, however the weights are cut up."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import fails_on_rank_one, length, run_job, succeeded
from safetensors.torch import load_file, save_file

from mezo_lightning import LowRank, MeZO, Trajectory

QUIET = {"startup_checks": False, "trainer_arguments": {"num_sanity_val_steps": 0, "limit_val_batches": 0}}
LORA = {"adapter": {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj", "v_proj"]}}
# Every sampler, and each kind of estimator, with weights gathered layer by layer: test_conformance_sharded.py.
CASES: dict[str, dict[str, Any]] = {
    "loss": {"steps": 8},  # the second epoch has begun
    "reward": {"steps": 5, "reward": length},  # an epoch, after which is a validation
    "low rank, copied": {
        "steps": 3, "evaluator": "copy", "optimizer": partial(MeZO, lr=1e-3, sampler=LowRank(2, refresh_right=2)),
    } | QUIET,
    "bf16": {"steps": 4, "precision": "bf16-true"} | QUIET,
    "fp16 compensated": {"steps": 4, "precision": "16-true", "rounding": "compensated"} | QUIET,
    "biases": {"steps": 4, "pretrained": {"trainable": "bias|layer_norm"}} | QUIET,
    "lora": {"steps": 4, "pretrained": LORA} | QUIET,
}  # fmt: skip
VALIDATED = ("loss", "reward")
STRATEGIES = ("replicated", "layer", "whole")
# Where every rank has all weights, nothing depends on their dtype or on which are tuned.
RUNS = [(s, name) for s in STRATEGIES for name in CASES if s != "replicated" or name in ("loss", "reward", "lora")]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def common(opt: Path, rows: Path) -> dict[str, Any]:
    return {"model": opt, "rows": rows, "batch_size": 4}


@pytest.fixture(scope="module")
def alone(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case on one process, in two micro-batches."""
    arguments = {"common": common | {"strategy": "one", "micro_batch_size": 2}, "cases": CASES}
    folder = tmp_path_factory.mktemp("alone")
    return succeeded(run_job("fits", 1, folder, **arguments, run=folder))[0]


@pytest.fixture(scope="module")
def together(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Every case on two processes, with each strategy."""
    folder = tmp_path_factory.mktemp("together")
    cases = {f"{strategy}: {name}": CASES[name] | {"strategy": strategy} for strategy, name in RUNS}
    return succeeded(run_job("fits", 2, folder, common=common, cases=cases, run=folder))


@pytest.fixture
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where the runs of a fixture are."""
    return lambda fixture: next(tmp_path_factory.getbasetemp().glob(f"{fixture}*"))


def joined(ranks: list[dict[str, Any]], name: str) -> torch.Tensor:
    """A whole parameter out of the pieces of all ranks."""
    return torch.cat([rank["held"][name][0] for rank in ranks])


@pytest.mark.parametrize(("strategy", "case"), RUNS)
def test_two_processes_equal_one_with_two_micro_batches_bit_for_bit(
    alone: dict[str, Any], together: list[dict[str, Any]], strategy: str, case: str
):
    one, two = alone[case], [rank[f"{strategy}: {case}"] for rank in together]
    assert len(one["steps"]) == CASES[case]["steps"]
    assert two[0]["steps"] == one["steps"]
    assert two[0]["digest"] == two[1]["digest"] == one["digest"]
    assert two[0]["fingerprint"] == two[1]["fingerprint"] == one["fingerprint"]
    assert two[0]["validation"] == two[1]["validation"] == one["validation"]
    assert bool(one["validation"]) == (case in VALIDATED)
    assert two[0]["counts"] == one["counts"]
    for name, (whole, _) in one["held"].items():
        if strategy == "replicated":
            assert torch.equal(two[0]["held"][name][0], whole), name
            assert torch.equal(two[1]["held"][name][0], whole), name
        else:
            assert torch.equal(joined(two, name), whole), name


def test_each_rank_holds_its_half(together: list[dict[str, Any]]):
    for strategy in ("layer", "whole"):
        for rank in together:
            held = rank[f"{strategy}: loss"]["held"]
            total, _ = rank[f"{strategy}: loss"]["counts"]
            mine = sum(piece.numel() for piece, _ in held.values())
            assert abs(mine - total / 2) <= len(held)  # odd sizes: one element of padding each


def test_base_and_trajectory_give_the_same_bytes_on_two_processes(
    alone: dict[str, Any], tmp_path: Path, made: Callable[[str], Path]
):
    runs = {case: made("alone") / case for case in ("loss", "biases", "lora")}
    ranks = succeeded(run_job("replayed", 2, tmp_path, runs=runs, strategy="layer"))
    for case in runs:
        for name, (whole, _) in alone[case]["held"].items():
            assert torch.equal(torch.cat([rank[case][name] for rank in ranks]), whole), (case, name)


@pytest.mark.usefixtures("alone", "together")
def test_every_log_begins_with_the_header_of_one_process(made: Callable[[str], Path]):
    """In it are fingerprints of all weights, frozen ones included, whatever pieces they are in."""
    for case in CASES:
        with Trajectory.open(made("alone") / case) as log:
            header = log.header
        assert bool(header.frozen) == (case in ("biases", "lora"))
        for strategy, name in RUNS:
            if name == case:
                with Trajectory.open(made("together") / f"{strategy}: {case}") as log:
                    assert log.header == header


def test_uneven_batches_an_empty_rank_and_unequal_completions_neither_hang_nor_change_sums(
    common: dict[str, Any], tmp_path: Path
):
    cases = {
        "seven rows": {"batch_size": 7},
        "seven rows, reward": {"batch_size": 7, "reward": length},
        "one row": {"batch_size": 1},  # rank zero has none
        "one row, reward": {"batch_size": 1, "reward": length},
        "uneven micro-batches": {"batch_size": 5, "micro_batch_size": 2, "reward": length},
    }
    common = common | {"steps": 2} | QUIET
    names = {
        f"{strategy}: {name}": case | {"strategy": strategy} for strategy in STRATEGIES for name, case in cases.items()
    }
    one = succeeded(
        run_job("fits", 1, tmp_path / "1", common=common | {"strategy": "one"}, cases=cases, run=tmp_path / "1")
    )[0]
    two = succeeded(run_job("fits", 2, tmp_path / "2", common=common, cases=names, run=tmp_path / "2"))
    for name, case in names.items():
        expected, found = one[name.split(": ")[1]]["steps"], two[0][name]["steps"]
        assert two[1][name]["digest"] == two[0][name]["digest"]
        if ("micro" not in name and "one row" in name) or "reward" in case:
            assert found == expected, name  # a reward has few values, and one row is one row
        for (mine, _), (theirs, _) in zip(found, expected, strict=True):
            assert [seed for seed, _ in mine] == [seed for seed, _ in theirs]
            # Rows padded to other widths may differ in the last bits of their losses, which the difference of two
            # probes magnifies: by 1 / epsilon, and by the learning rate in a step's coefficient.
            for (_, coefficients), (_, others) in zip(mine, theirs, strict=True):
                assert coefficients == pytest.approx(others, rel=1e-4, abs=1e-7), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_a_reward_raises_on_one_rank_is_raised_on_both(common: dict[str, Any], tmp_path: Path, strategy: str):
    arguments = common | {"strategy": strategy, "steps": 2, "reward": fails_on_rank_one, "startup_checks": False}
    zero, one = succeeded(run_job("failing_fit", 2, tmp_path, **arguments, run=tmp_path / "run"))
    assert "LookupError: no such judge" in zero
    assert zero.startswith("RankError: rank 1 of 2 failed")
    assert "LookupError: no such judge" in one


@pytest.mark.parametrize(("kind", "pretrained"), [("tuned", {}), ("frozen", {"trainable": "bias"})])
def test_ranks_that_begin_with_different_weights_are_refused(
    common: dict[str, Any], tmp_path: Path, kind: str, pretrained: dict[str, Any]
):
    other = Path(shutil.copytree(common["model"], tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    next(value for name, value in weights.items() if name.endswith("fc1.weight"))[0, 0] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    rest = {name: value for name, value in common.items() if name != "model"}
    models = [common["model"], other]
    arguments = rest | {"strategy": "replicated", "steps": 1, "pretrained": pretrained, "run": tmp_path / "run"}
    for error in succeeded(run_job("fit_of_different_bases", 2, tmp_path / "job", models=models, **arguments)):
        assert f"ValueError: the {kind} weights of rank 1 are not those of rank 0" in error


@pytest.mark.parametrize("strategy", ["replicated"])
def test_ranks_that_drift_apart_stop_the_run(common: dict[str, Any], tmp_path: Path, strategy: str):
    arguments = common | {"strategy": strategy, "steps": 9, "strategy_arguments": {"check_every_n_steps": 3}}
    for error in succeeded(run_job("drifting_fit", 2, tmp_path, **arguments, at=4, run=tmp_path / "run")):
        assert "drifted apart: at step 6, rank 1 has other weights than rank 0" in error
