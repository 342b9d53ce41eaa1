"""What was left out of a round: found, kept with the step, and left out again by another run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from mezo_lightning.data.batch import Batch
from mezo_lightning.evaluators import Evaluation, Samples
from mezo_lightning.measurements import flatten, step_record
from mezo_lightning.reporting.records import RunRecords
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.masks import RecordedMasks, Rounds
from mezo_lightning.steps import GradientEstimate, Point

BATCH = Batch((40, 41, 42), ("a", "b", "c"), None, None, None, {})


def evaluation(*valid: list[list[bool]]) -> Evaluation:
    """A round in which these components of three samples were valid at each point."""
    samples = [Samples(torch.zeros(3, 2), torch.tensor(each)) for each in valid]
    return Evaluation.of([Point(label=str(place)) for place in range(len(valid))], samples, 0.0)


ALL = [[True, True]] * 3
SOME = [[True, True], [False, True], [True, True]]
FEW = [[True, True], [True, True], [False, False]]


def test_what_is_missing_at_one_point_is_left_out_of_the_round() -> None:
    rounds, numbers, found = Rounds(), [], iter([evaluation(ALL, ALL), evaluation(SOME, FEW), evaluation(ALL, ALL)])

    def evaluate(points: Any) -> Evaluation:
        numbers.append(rounds.number)
        return next(found)

    watched = rounds.begin(evaluate, BATCH)
    for _ in range(2):
        watched([])
    assert rounds.masks == [[], [(41, 0), (42, 0), (42, 1)]]
    assert rounds.number is None
    watched = rounds.begin(evaluate, BATCH)
    watched([])
    assert rounds.masks == [], "the next step; where nothing is left out there is nothing to keep"
    assert numbers == [0, 1, 0]


def test_an_error_ends_the_round() -> None:
    def evaluate(points: Any) -> Evaluation:
        raise LookupError

    rounds = Rounds()
    with pytest.raises(LookupError):
        rounds.begin(evaluate, BATCH)([])
    assert rounds.number is None


def record_of(step: int, masks: Any) -> Any:
    estimate = GradientEstimate(evaluation=evaluation(ALL, ALL), skipped="no reason")
    tally = Tally(asked=3, remembered=1, failed=2, seconds=[0.5])
    tally.say("judge", "cost", [1, 2])
    return step_record(estimate, step, [0.1], 1.0, masks=masks, tally=tally)


def test_masks_are_kept_with_their_step(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.append(record_of(1, []))
    records.append(record_of(2, [[], [(41, 0), (42, 1)]]))
    assert [record.masks for record in records.steps()] == [[], [[], [[41, 0], [42, 1]]]]
    masks = RecordedMasks(tmp_path)
    assert list(masks.at(0, 0, BATCH.index)) == []
    assert list(masks.at(1, 0, BATCH.index)) == []
    assert list(masks.at(1, 1, BATCH.index)) == [(41, 0), (42, 1)]
    with pytest.raises(ValueError, match="has no step 3"):
        masks.at(2, 0, BATCH.index)
    with pytest.raises(ValueError, match=r"leaves out rows \[42\] at step 2"):
        masks.at(1, 1, (40, 41))


def test_records_of_older_runs_have_no_masks(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.append(record_of(1, []))
    path = tmp_path / "steps.jsonl"
    path.write_text(path.read_text().replace(', "masks": []', ""))
    assert "masks" not in path.read_text()
    assert RecordedMasks(tmp_path).at(0, 0, BATCH.index) == []


def test_how_asking_went_is_logged_apart_from_what_was_said() -> None:
    record = record_of(1, [])
    assert record.metrics == {"rewards/judge/cost": 1.5}
    assert record.calls == {"asked": 3.0, "failed": 2.0, "hit_rate": 0.25, "seconds_p50": 0.5, "seconds_p95": 0.5}
    logged = flatten(record)
    assert logged["rewards/calls/hit_rate"] == 0.25
    assert logged["rewards/judge/cost"] == 1.5
