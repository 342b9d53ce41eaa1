"""Two processes that share the weights out give the run of one, with every sampler and each kind of estimator.

The job of two processes starts once for all cases, and so does that of one. Ways of putting weights together, and of
rounding 16-bit ones, have more cases in ``test_sharded.py``.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance import ESTIMATORS, SAMPLERS
from jobs import run_job, succeeded

from mezo_lightning import Cone, DenseAdam, MeZO, Trail

LORA = {"adapter": {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj", "v_proj"]}}
# One of each kind: to an evaluator all points are alike.
SERVED = ("n-spsa", "guided", "fzoo", "ranked es", "comparison")
CASES: dict[str, dict[str, Any]] = {
    **{sampler: {"optimizer": partial(MeZO, lr=1e-3, sampler=SAMPLERS[sampler])} for sampler in SAMPLERS},
    **{estimator: {"estimator": ESTIMATORS[estimator].estimator} for estimator in SERVED},
    "cone": {"estimator": Cone(), "optimizer": partial(MeZO, lr=1e-3, update=Trail())},
    "bf16, lozo": {"precision": "bf16-true", "optimizer": partial(MeZO, lr=1e-3, sampler=SAMPLERS["lozo"])},
    "gathered whole, guided": {"strategy": "whole", "estimator": ESTIMATORS["guided"].estimator},
    "dense adam": {"optimizer": partial(MeZO, lr=1e-3, update=DenseAdam())},
    "lora": {"pretrained": LORA},
    "lora, lozo": {"pretrained": LORA, "optimizer": partial(MeZO, lr=1e-3, sampler=SAMPLERS["lozo"])},
    "lora, sparse": {"pretrained": LORA, "optimizer": partial(MeZO, lr=1e-3, sampler=SAMPLERS["sparse"])},
    "lora, guided": {"pretrained": LORA, "estimator": ESTIMATORS["guided"].estimator},
}
STEPS = 3  # the factors of some samplers are drawn anew after the second one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(opt: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every case on one process in two micro-batches, and on the two ranks of another job."""
    common: dict[str, Any] = {
        "model": opt,
        "rows": rows,
        "batch_size": 4,
        "steps": STEPS,
        "startup_checks": False,
        "trainer_arguments": {"num_sanity_val_steps": 0, "limit_val_batches": 0},
    }
    found = []
    alone = {"strategy": "one", "micro_batch_size": 2}
    for ranks, cases in (
        (1, {name: case | alone for name, case in CASES.items()}),
        (2, {name: {"strategy": "layer"} | case for name, case in CASES.items()}),
    ):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found += succeeded(run_job("fits", ranks, folder, common=common, cases=cases, run=folder))
    return found


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_of_zero3_equal_one_process_bit_for_bit(runs: list[dict[str, Any]], case: str):
    one, zero, other = (run[case] for run in runs)
    assert len(one["steps"]) == STEPS
    assert all(any(any(coefficients) for _, coefficients in terms) for terms, _ in one["steps"])
    assert zero["steps"] == one["steps"]
    assert one["digest"] == zero["digest"] == other["digest"]
    assert one["fingerprint"] == zero["fingerprint"] == other["fingerprint"]
    for name, (whole, _) in one["held"].items():
        assert torch.equal(torch.cat([zero["held"][name][0], other["held"][name][0]]), whole), name
