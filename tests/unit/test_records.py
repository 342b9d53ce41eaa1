"""The records of a run survive what happens to runs: NaN, kill -9, a resume, a second start."""

import math
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from mezo_lightning.reporting.records import RunInfo, RunRecords, SampleRecord, StepRecord, ValidationRecord


def step_record(step: int, **changes) -> StepRecord:
    record = StepRecord(
        step=step,
        objective={"q0+": -0.5, "q0-": -0.25},
        projected_grads=[-125.0],
        lr=[1e-3],
        valid_fraction=1.0,
        tie_fraction=0.5,
        identical_fraction=0.25,
        probes_per_second=10.0,
        skipped=None,
        metrics={"reward": 0.375},
        seconds=0.1 * step,
    )
    return replace(record, **changes)


INFO = RunInfo(
    command="mezo fit",
    model="tiny",
    parameters=10,
    trainable_parameters=4,
    dtype="float32",
    device="cpu",
    versions={"torch": "2"},
    started="2026-01-01T00:00:00+00:00",
    replay_command="mezo replay",
    notes=("stopped",),
    scalar_meaning="A slope.",
    one_slope=True,
)


def test_records_come_back_as_they_went(tmp_path):
    records = RunRecords(tmp_path / "made" / "on" / "demand")
    steps = [step_record(1), step_record(2, skipped="non-finite objective", identical_fraction=None)]
    validation = ValidationRecord(0, 1.5, {"reward": 0.25}, rows=8)
    sample = SampleRecord(
        0, 3, 'line\nbreak "quoted" \u2028 é \ud800', "", {"reward": 1.0}, {"f1/why": "é", "f1/n": 2.5}, target=" right"
    )
    untargeted = replace(sample, index=4, target=None)
    for record in (*steps, validation, sample, untargeted):
        records.append(record)
    records.write_info(INFO)
    again = RunRecords(records.folder)
    assert again.steps() == steps
    assert again.validations() == [validation]
    assert again.samples() == [sample, untargeted]
    assert again.info() == INFO


def test_a_folder_without_records_is_empty(tmp_path):
    records = RunRecords(tmp_path)
    assert (records.steps(), records.validations(), records.samples(), records.info()) == ([], [], [], None)
    records.truncate(5)
    records.clear()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_is_stored_as_null(tmp_path, value):
    records = RunRecords(tmp_path)
    records.append(step_record(1, objective={"q0+": value}, projected_grads=[value, 2.0]))
    assert "null" in (tmp_path / "steps.jsonl").read_text()
    (record,) = records.steps()
    assert math.isnan(record.objective["q0+"])
    assert math.isnan(record.projected_grads[0])
    assert record.projected_grads[1] == 2.0


def test_a_torn_last_line_is_ignored_and_then_cut_off(tmp_path):
    records = RunRecords(tmp_path)
    records.append(step_record(1))
    records.append(step_record(2))
    whole = (tmp_path / "steps.jsonl").read_bytes()
    for cut in range(1, len(whole) // 2):
        (tmp_path / "steps.jsonl").write_bytes(whole[:-cut])
        assert [record.step for record in records.steps()] == [1]
    records.truncate(2)
    records.append(step_record(2))
    assert [record.step for record in records.steps()] == [1, 2]


def test_damage_in_the_middle_is_said_not_hidden(tmp_path):
    records = RunRecords(tmp_path)
    records.append(step_record(1))
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 2}\nnot json\n')
    with pytest.raises(ValueError, match=r"steps\.jsonl:2: not a StepRecord"):
        records.steps()


def test_truncate_drops_what_the_checkpoint_does_not_know(tmp_path):
    records = RunRecords(tmp_path)
    for step in range(5):
        records.append(step_record(step + 1))
        records.append(ValidationRecord(step, 0.0, {}))
        records.append(SampleRecord(step, 0, "p", "c", {}))
    records.truncate(2)
    assert [record.step for record in records.steps()] == [1, 2]
    assert [record.step for record in records.validations()] == [0, 1, 2]
    assert [record.step for record in records.samples()] == [0, 1, 2]


def test_the_later_of_two_records_counts(tmp_path):
    records = RunRecords(tmp_path)
    for value in (0.1, 0.2):
        records.append(ValidationRecord(4, 0.0, {"reward": value}))
        records.append(SampleRecord(4, 7, "p", str(value), {}))
    assert [record.metrics["reward"] for record in records.validations()] == [0.2]
    assert [record.completion for record in records.samples()] == ["0.2"]


def test_every_record_that_was_written_survives_kill_9(tmp_path):
    child = """
import sys
from mezo_lightning.reporting.records import RunRecords, ValidationRecord
records = RunRecords(sys.argv[1])
for step in range(10**9):
    records.append(ValidationRecord(step, 0.0, {"reward": 0.5}))
    print(step, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", child, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(200)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    steps = [record.step for record in RunRecords(tmp_path).validations()]
    assert steps == list(range(len(steps)))
    assert len(steps) > acknowledged
