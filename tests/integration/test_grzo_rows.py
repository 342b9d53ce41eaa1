"""Which row a direction belongs to: in micro-batches, on other ranks, among equal rows, and with several options."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import Watch, data_of, module_of, reward_of, steps_taken, trainer_of
from jobs import run_job, succeeded
from reward_examples import letters

from mezo_lightning import GRZO, CrossEntropy, Flipout, MeZO
from mezo_lightning.steps import Step

OPTIMIZER = functools.partial(MeZO, lr=1e-4, sampler=Flipout())


def run(folder: Path, opt: Path, rows: Path, objective: Any, data: dict[str, Any], **arguments: Any) -> Watch:
    watch = Watch()
    module = module_of(opt, objective, estimator=GRZO(1e-2, normalize=False), optimizer=OPTIMIZER, **arguments)
    trainer_of(folder, 2, callbacks=[watch]).fit(module, data_of(rows, **data))
    return watch


def assert_same_steps(one: list[Step], other: list[Step], rel: float = 1e-3) -> None:
    """To the rounding that batches of other sizes have."""
    assert [[seed for seed, _ in step.terms] for step in one] == [[seed for seed, _ in step.terms] for step in other]
    for first, second in zip(one, other, strict=True):
        size = max(abs(c) for _, coefficients in first.terms for c in coefficients)
        for (_, a), (_, b) in zip(first.terms, second.terms, strict=True):
            assert a == pytest.approx(b, rel=rel, abs=rel * size)


LABELLED = {"target": None, "options": [" the mill by the river", " it", " the old garden"], "label": "label"}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "loss": (CrossEntropy(), {}),
    "options": (CrossEntropy(), LABELLED),
    "reward": (reward_of(letters), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_make_the_same_steps(case: str, tmp_path: Path, opt: Path, rows: Path):
    objective, data = CASES[case]
    run(tmp_path / "whole", opt, rows, objective, data)
    run(tmp_path / "cut", opt, rows, objective, data, micro_batch_size=3)
    assert_same_steps(steps_taken(tmp_path / "whole"), steps_taken(tmp_path / "cut"))
    assert all(len(step.terms) == 4 for step in steps_taken(tmp_path / "whole"))


def test_equal_rows_have_directions_of_their_own(tmp_path: Path, opt: Path):
    path = tmp_path / "equal.jsonl"
    path.write_text((json.dumps({"question": "Where is it?", "answer": " there"}) + "\n") * 8)
    [first, *_] = run(tmp_path / "run", opt, path, CrossEntropy(), {}).records
    assert len(set(first.projected_grads)) == 4


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path: Path, opt: Path, rows: Path):
    run(tmp_path / "one", opt, rows, CrossEntropy(), {"num_validation": 5})
    common = {"strategy": "replicated", "steps": 2, "optimizer": OPTIMIZER, "estimator": GRZO(1e-2, normalize=False)}
    two = succeeded(run_job("fit", 2, tmp_path / "job", model=opt, rows=rows, run=tmp_path / "two", **common))
    assert_same_steps(steps_taken(tmp_path / "one"), steps_taken(tmp_path / "two"))
    assert two[0]["digest"] == two[1]["digest"]
