"""Callbacks that make a run visible: records on disk, samples in the terminal, a warning, and a report at the end.

They work with any LightningModule that returns `{"record": StepRecord}` from `training_step` and
`{"samples": list[SampleRecord]}` from `validation_step`, and logs its validation figures as `val/...`.
The run folder is the trainer's `default_root_dir`. Only rank zero writes and prints.

"Before" is Lightning's sanity-check pass: a validation inside `fit`, before the first step, with the same hooks. It
counts where it covers all validation rows, which takes `trainer.num_sanity_val_steps=-1`. A resumed run skips the pass,
and finds what was written before the first step still in its folder.
"""

import resource
import shlex
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Protocol, runtime_checkable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from mezo_lightning.estimators import Estimator
from mezo_lightning.reporting import terminal
from mezo_lightning.reporting.outcome import flat_note, is_flat, judge
from mezo_lightning.reporting.records import RunInfo, RunRecords, StepRecord, ValidationRecord
from mezo_lightning.reporting.redaction import redact_command
from mezo_lightning.reporting.report import sample_pairs, write_report
from mezo_lightning.transforms import Identity

_VALIDATION_PREFIX = "val/"
_PACKAGES = ("mezo-lightning", "torch", "lightning", "transformers")


@runtime_checkable
class DescribesItsModel(Protocol):
    """A LightningModule that says what model it tunes; others go by the name of their class."""

    @property
    def model_name(self) -> str: ...

    @property
    def parameter_counts(self) -> tuple[int, int]: ...


class _TrainingCallback(Callback):
    """Knows whether this session has begun to train.

    An error before that says all by itself, and must not touch the folder: it may be that of an earlier run.
    """

    _began = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet."""
        self._began = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on."""
        self._began = True


class RunRecorder(_TrainingCallback):
    """Writes the records of a run into its folder: steps.jsonl, validation.jsonl, samples.jsonl and run.json.

    List it before the callbacks that read the records (`SampleTable`, `ReportWriter`).
    """

    def __init__(self) -> None:
        self._seconds_before = 0.0  # of the sessions that this one continues
        self._started = time.monotonic()
        self._rows = 0
        self._saw_base = False
        self._truncated = True

    def state_dict(self) -> dict[str, Any]:
        """The clock goes on counting when a run is resumed."""
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the clock of the checkpoint."""
        self._seconds_before = state_dict["seconds"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        super().setup(trainer, pl_module, stage)
        self._started = time.monotonic()
        self._saw_base = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew: this pass is only made by a run that starts from the base model."""
        if trainer.is_global_zero:
            _records(trainer).clear()
        self._saw_base = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier session did after the checkpoint that this one starts from."""
        super().on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            if trainer.global_step == 0 and not self._saw_base:
                _records(trainer).clear()
            self._truncated = False
            self._write_info(trainer, pl_module, status="running")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step's record."""
        record: StepRecord | None = outputs["record"]
        if not trainer.is_global_zero or record is None:  # a step that a resumed run repeats is on record already
            return
        if not self._truncated:
            _records(trainer).truncate(record.step - 1)
            self._truncated = True
        _records(trainer).append(replace(record, seconds=self._seconds()))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count rows from zero."""
        self._rows = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the batch's samples."""
        self._rows += len(batch)
        if trainer.is_global_zero and _records_validation(trainer):
            for sample in outputs["samples"]:
                _records(trainer).append(sample)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's figures."""
        if not trainer.is_global_zero or not _records_validation(trainer):
            return
        metrics = {
            name.removeprefix(_VALIDATION_PREFIX): float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(_VALIDATION_PREFIX)
        }
        record = ValidationRecord(trainer.global_step, self._seconds(), metrics, self._rows)
        _records(trainer).append(record)
        if trainer.sanity_checking:  # Lightning logs nothing of this pass; the loggers' curves start here too
            for logger in trainer.loggers:
                logger.log_metrics({_VALIDATION_PREFIX + name: value for name, value in metrics.items()}, step=0)
        self._write_info(trainer, pl_module, status="running")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down that the run finished."""
        if trainer.is_global_zero:
            self._write_info(trainer, pl_module, status="finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write down why the run stopped."""
        if not trainer.is_global_zero or not self._began:
            return
        if isinstance(exception, KeyboardInterrupt):
            self._write_info(trainer, pl_module, "interrupted", f"Stopped by hand after step {trainer.global_step}.")
        else:
            reason = str(exception).strip().split("\n")[0][:300]
            note = f"Stopped after step {trainer.global_step} by {type(exception).__name__}: {reason}"
            self._write_info(trainer, pl_module, "failed", note)

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _write_info(self, trainer: Trainer, pl_module: LightningModule, status: str, *notes: str) -> None:
        records = _records(trainer)
        earlier = records.info()
        describes = isinstance(pl_module, DescribesItsModel)
        parameters, trainable = pl_module.parameter_counts if describes else _parameter_counts(pl_module)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        scalar_meaning, one_slope = _scalars(pl_module)
        records.write_info(
            RunInfo(
                command=shlex.join(redact_command([Path(sys.argv[0]).name, *sys.argv[1:]])),
                model=pl_module.model_name if describes else type(pl_module).__name__,
                parameters=parameters,
                trainable_parameters=trainable,
                dtype=", ".join(sorted({str(p.dtype)[6:] for p in pl_module.parameters() if p.requires_grad})),
                device=_device_name(trainer.strategy.root_device),
                versions={"python": python_version(), **{name: _version(name) for name in _PACKAGES}},
                started=earlier.started if earlier else now,
                replay_command=_replay_command(records.folder),
                status=status,
                steps=trainer.global_step,
                planned_steps=trainer.max_steps if trainer.max_steps > 0 else None,
                wall_seconds=self._seconds(),
                peak_memory_bytes=max(_peak_memory(trainer), earlier.peak_memory_bytes if earlier else 0),
                notes=notes,
                scalar_meaning=scalar_meaning,
                one_slope=one_slope,
            )
        )


class SampleTable(Callback):
    """Prints validation rows as a table: prompt, completion before training, completion now, score.

    Args:
        every_n_validations: Print after each n-th validation (and after the one before training).
        num_samples: How many rows to print, of those that the module samples.
    """

    def __init__(self, every_n_validations: int = 1, num_samples: int = 4):
        if every_n_validations < 1 or num_samples < 1:
            raise ValueError(
                f"every_n_validations={every_n_validations} and num_samples={num_samples} must be at least 1; "
                "leave the callback out to print no table."
            )
        self.every_n_validations = every_n_validations
        self.num_samples = num_samples
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table."""
        if not trainer.is_global_zero or not _records_validation(trainer):
            return
        self._validations += not trainer.sanity_checking
        if not trainer.sanity_checking and self._validations % self.every_n_validations:
            return
        records = _records(trainer)
        metric = judge(records.steps(), records.validations()).metric
        pairs = sample_pairs(records.samples(), metric)[: self.num_samples]
        if pairs:
            title = f"step {trainer.global_step}" if trainer.global_step else "before training"
            terminal.write(terminal.sample_table(pairs, title))


class FlatRewardWarning(Callback):
    """Says so, once, when every pair of probes has tied for many steps on end: such a run only looks as if it trains.

    Args:
        patience: How many steps in a row must be flat.
    """

    def __init__(self, patience: int = 20):
        if patience < 1:
            raise ValueError(f"patience={patience} must be at least 1; leave the callback out to be told nothing.")
        self.patience = patience
        self._flat = 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count flat steps."""
        record: StepRecord | None = outputs["record"]
        self._flat = self._flat + 1 if record is not None and is_flat(record) else 0
        if self._flat == self.patience and trainer.is_global_zero:
            terminal.write(terminal.warning(f"Flat reward. {flat_note(self._flat, self._flat)}"))


class ReportWriter(_TrainingCallback):
    """Writes `report.html` into the run folder at the end, also of a run that was interrupted or failed."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report and say where it is."""
        if trainer.is_global_zero:
            _report(_records(trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report on what there is, without getting in the way of the error."""
        if not trainer.is_global_zero or not self._began:
            return
        try:
            _report(_records(trainer))
        except Exception as error:  # the user has to see what stopped the run, not what stopped the report
            terminal.write(terminal.warning(f"The report could not be written: {error}"))


def _report(records: RunRecords) -> None:
    path, steps = write_report(records.folder), records.steps()
    outcome = judge(steps, records.validations(), records.info())
    terminal.write(terminal.closing(outcome, path, _replay_command(records.folder) if steps else None))


def _records(trainer: Trainer) -> RunRecords:
    return RunRecords(trainer.default_root_dir)


def _records_validation(trainer: Trainer) -> bool:
    """Whether this pass is part of a fit and over all rows, unlike a sanity check of two batches."""
    if trainer.state.fn != TrainerFn.FITTING:
        return False
    return not trainer.sanity_checking or trainer.num_sanity_val_batches == trainer.num_val_batches


def _replay_command(folder: Path) -> str:
    return shlex.join(["mezo", "replay", "--trajectory", str(folder), "--output", str(folder / "replayed")])


def _scalars(module: LightningModule) -> tuple[str | None, bool]:
    """What a projected gradient of the module is, and whether those of a step are one slope."""
    estimator, transform = getattr(module, "estimator", None), getattr(module, "transform", None)
    if not isinstance(estimator, Estimator):
        return None, False
    left = "" if transform is None or isinstance(transform, Identity) else f" Shown as transform={transform} left it."
    return estimator.scalar_meaning + left, estimator.one_slope


def _parameter_counts(module: LightningModule) -> tuple[int, int]:
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trainable in sizes if trainable)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # a checkout on the path works too
        return "not installed"


def _peak_memory(trainer: Trainer) -> int:
    """Bytes: of the accelerator's allocator where there is one, else of this process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB
