"""What a run writes about itself: one JSON line a step, a validation and a sample, and one file about the run.

The report and the sample table are made from these files alone. Lightning's CSVLogger cannot serve: it deletes its file
when a run is resumed. Each line has left the process before training goes on, so a killed run loses at most the line
being written; a torn last line is ignored when read, and cut off when the run is resumed (`RunRecords.truncate`).

Numbers that are NaN or infinite are stored as null (JSON has no other word) and read back as NaN.
Where a step, a validation or a sample occurs twice (a resumed run validates again), the later line counts.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar


@dataclass(frozen=True)
class StepRecord:
    """One training step."""

    step: int
    """Steps done so far, this one included: the first step is 1, as in `trainer.global_step` after it."""
    objective: dict[str, float]
    """Mean objective (minimised) at each probe, by the probe's name."""
    projected_grads: list[float]
    lr: list[float]
    """Learning rate of each parameter group."""
    valid_fraction: float
    """Share of the samples whose value counts at every probe."""
    tie_fraction: float
    """Share of the samples that have the same value at both probes of a pair."""
    identical_fraction: float | None
    """Share of the samples with the same completion at both probes; None where nothing is completed."""
    probes_per_second: float
    skipped: str | None
    """Why the step was skipped; None where it was not."""
    metrics: dict[str, float]
    """Means over the batch and its probes, such as "reward" and "rewards/f1"."""
    seconds: float = 0.0
    """Wall time of the run when the step ended, continued over resumes. `RunRecorder` fills it in."""
    calls: dict[str, float] = field(default_factory=dict)
    """How asking the rewards went: rows asked and failed, hit rate, seconds of a call. It has no part in the step."""
    masks: list[list[list[int]]] = field(default_factory=list)
    """What was left out of each round of points, as pairs [row, component]; empty where nothing was. See `masks.py`."""
    update_rms: float | None = None
    """Root mean square change of a tuned weight, weight decay left out, see `MeZO.update_rms`; None where that is not
    known."""


@dataclass(frozen=True)
class ValidationRecord:
    """One pass over the validation rows; step 0 is the model before training."""

    step: int
    seconds: float
    metrics: dict[str, float]
    rows: int | None = None
    """How many rows the means are over."""


@dataclass(frozen=True)
class SampleRecord:
    """One validation row as a person reads it."""

    step: int
    index: int
    prompt: str
    completion: str
    metrics: dict[str, float]
    notes: dict[str, float | str] = field(default_factory=dict)
    """What rewards said of the completion beside their values, as `{reward}/{name}`."""
    target: str | None = None
    """The right continuation, where the data has one."""


@dataclass(frozen=True)
class RunInfo:
    """What is known of the run as a whole."""

    command: str
    model: str
    parameters: int
    trainable_parameters: int
    dtype: str
    device: str
    versions: dict[str, str]
    started: str
    """When the run was first started (ISO 8601)."""
    replay_command: str
    status: str = "running"
    """`running`, `finished`, `interrupted` or `failed`."""
    steps: int = 0
    planned_steps: int | None = None
    """`max_steps`; None where the run has no such limit."""
    wall_seconds: float = 0.0
    """Set-up, training and validation; a resumed run goes on counting from its checkpoint."""
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    """Sentences for the report, such as why the run stopped."""
    scalar_meaning: str | None = None
    """What a projected gradient of this run is, see `Estimator`; None where nobody said."""
    one_slope: bool = False
    """Whether those of a step are one slope with the signs of several terms."""


Record = StepRecord | ValidationRecord | SampleRecord
RecordType = TypeVar("RecordType", bound=Record)

FILES: Mapping[type[Record], str] = {
    StepRecord: "steps.jsonl",
    ValidationRecord: "validation.jsonl",
    SampleRecord: "samples.jsonl",
}
INFO_FILE = "run.json"
_NONE_MEANS_NONE = frozenset(
    {"identical_fraction", "update_rms", "skipped", "rows", "planned_steps", "target"}
)  # elsewhere null was a NaN


class RunRecords:
    """The records in one run folder."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def append(self, record: Record) -> None:
        """Add one line; it has left this process when the call returns."""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(_finite(asdict(record)), allow_nan=False)
        with open(self.folder / FILES[type(record)], "a", encoding="utf-8") as file:
            file.write(line + "\n")

    def steps(self) -> list[StepRecord]:
        """All training steps, in order."""
        return _last_of_each(self._read(StepRecord), key=lambda record: record.step)

    def validations(self) -> list[ValidationRecord]:
        """All validations, in order of their step."""
        return _last_of_each(self._read(ValidationRecord), key=lambda record: record.step)

    def samples(self) -> list[SampleRecord]:
        """All samples, in order of step and row."""
        return _last_of_each(self._read(SampleRecord), key=lambda record: (record.step, record.index))

    def clear(self) -> None:
        """Forget an earlier run."""
        for name in (*FILES.values(), INFO_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def truncate(self, step: int) -> None:
        """Forget what came after `step`, and torn lines, as a run that is resumed from a checkpoint needs."""
        for kind, name in FILES.items():
            if not (self.folder / name).exists():
                continue
            kept = [record for record in self._read(kind) if record.step <= step]
            lines = (json.dumps(_finite(asdict(record)), allow_nan=False) + "\n" for record in kept)
            _replace(self.folder / name, "".join(lines))

    def write_info(self, info: RunInfo) -> None:
        """Write run.json, in place of an earlier one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _replace(self.folder / INFO_FILE, json.dumps(_finite(asdict(info)), indent=2, allow_nan=False) + "\n")

    def info(self) -> RunInfo | None:
        """The contents of run.json; None where there is no such file."""
        path = self.folder / INFO_FILE
        if not path.exists():
            return None
        fields = json.loads(path.read_text(encoding="utf-8"))
        return RunInfo(**{**fields, "notes": tuple(fields["notes"])})

    def _read(self, kind: type[RecordType]) -> list[RecordType]:
        path = self.folder / FILES[kind]
        if not path.exists():
            return []
        # Split at "\n" only: whatever follows the last one is a line that was never finished.
        lines = path.read_bytes().split(b"\n")[:-1]
        return [_parse(kind, line, where=f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(kind: type[RecordType], line: bytes, where: str) -> RecordType:
    try:
        fields = json.loads(line)
        return kind(**{name: value if name in _NONE_MEANS_NONE else _nan(value) for name, value in fields.items()})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: not a {kind.__name__} ({error}). Delete that line, or start in a new run folder."
        ) from error


def _last_of_each(records: Iterable[RecordType], key: Callable[[RecordType], Any]) -> list[RecordType]:
    last = {key(record): record for record in records}
    return [last[each] for each in sorted(last)]


def _replace(path: Path, text: str) -> None:
    # A reader (or a kill) sees the old file or the new one, never half of one.
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def _nan(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, dict):
        return {key: _nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_nan(item) for item in value]
    return value
