"""The callbacks in real Lightning runs: what is on disk and on screen after a run, a crash, a resume, a new start."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from mezo_lightning.callbacks import FlatRewardWarning, ReportWriter, RunRecorder, SampleTable
from mezo_lightning.estimators import GuidingVector
from mezo_lightning.reporting import terminal
from mezo_lightning.reporting.outcome import judge
from mezo_lightning.reporting.records import RunRecords, SampleRecord, StepRecord
from mezo_lightning.reporting.report import sample_pairs
from mezo_lightning.transforms import Clip, Identity

pytestmark = pytest.mark.filterwarnings(  # Lightning's own
    "ignore:.*LeafSpec.*",
    "ignore:.*no pre-optimization state was saved.*",
    "ignore:.*does not have many workers.*",
    "ignore:.*Checkpoint directory.*exists and is not empty.*",
    "ignore:.*Experiment logs directory.*exists and is not empty.*",
    "ignore:.*You're resuming from a checkpoint that ended before the epoch ended.*",
)
ROWS = 8


class Toy(LightningModule):
    """A module with one weight, which grows by 1 a step and is its own reward."""

    model_name = "toy/one-weight"
    parameter_counts = (4, 1)

    def __init__(self, *, flat: bool = False, stop_at: int | None = None, error: BaseException | None = None):
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.flat, self.stop_at, self.error = flat, stop_at, error

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=1.0)

    def training_step(self, batch, batch_idx):
        if self.error is not None and self.global_step == self.stop_at:
            raise self.error
        self.weight.grad = -torch.ones(1)
        self.optimizers().step()  # pyright: ignore[reportAttributeAccessIssue]
        record = StepRecord(
            step=self.global_step,
            objective={"q0+": 1.0, "q0-": 2.0},
            projected_grads=[0.0 if self.flat else -1.0],
            lr=[1.0],
            valid_fraction=1.0,
            tie_fraction=0.0,
            identical_fraction=None,
            probes_per_second=2.0,
            skipped=None,
            metrics={"reward": self.weight.item()},
        )
        return {"record": record}

    def validation_step(self, batch, batch_idx):
        self.log("val/reward", self.weight.item(), batch_size=len(batch))
        self.log("other", 1.0, batch_size=len(batch))
        rows = [int(row) for row in batch] if batch_idx == 0 else []
        metrics = {"reward": self.weight.item()}
        return {"samples": [SampleRecord(self.global_step, i, f"prompt {i}", f"said {metrics}", metrics) for i in rows]}


def run(folder, model, max_steps, *callbacks, ckpt_path=None, sanity=-1, bar=None, **options):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=sanity,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version="logs"),
        callbacks=[RunRecorder(), *callbacks, *([bar] if bar else [])],
        enable_progress_bar=bar is not None,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )
    rows = DataLoader(torch.arange(ROWS), batch_size=4)
    trainer.fit(model, DataLoader(torch.arange(12), batch_size=2), rows, ckpt_path=ckpt_path)
    return trainer, RunRecords(folder)


def validated(records: RunRecords) -> list[tuple[int, float]]:
    return [(record.step, record.metrics["reward"]) for record in records.validations()]


def test_a_run_writes_its_steps_validations_samples_and_facts(tmp_path):
    _, records = run(tmp_path, Toy(), 5)
    steps = records.steps()
    assert [record.step for record in steps] == [1, 2, 3, 4, 5]
    assert [record.metrics["reward"] for record in steps] == [1, 2, 3, 4, 5]
    assert 0 < steps[0].seconds < steps[-1].seconds
    assert validated(records) == [(0, 0.0), (2, 2.0), (4, 4.0)]
    assert {record.rows for record in records.validations()} == {ROWS}
    assert all(record.metrics == {"reward": record.step} for record in records.validations())
    assert [(sample.step, sample.index) for sample in records.samples()] == [
        (s, i) for s in (0, 2, 4) for i in range(4)
    ]
    info = records.info()
    assert info is not None
    assert info.scalar_meaning is None  # a module without an estimator
    assert (info.status, info.model, info.steps, info.planned_steps) == ("finished", "toy/one-weight", 5, 5)
    assert (info.parameters, info.trainable_parameters, info.dtype) == (4, 1, "float32")
    assert info.wall_seconds >= steps[-1].seconds
    assert info.peak_memory_bytes > 50 * 2**20  # a process with torch in it
    assert info.versions["torch"] == torch.__version__
    assert str(tmp_path) in info.replay_command


def test_the_command_is_kept_without_its_secrets(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/mezo", "fit", "--judge.api_key=abc", "--name", "a b"])
    _, records = run(tmp_path, Toy(), 1)
    info = records.info()
    assert info is not None
    assert info.command == "mezo fit '--judge.api_key=[hidden]' --name 'a b'"


def test_loggers_start_with_the_base_model(tmp_path):
    run(tmp_path, Toy(), 2)
    header, first, *_ = (tmp_path / "logs" / "metrics.csv").read_text().splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    assert (row["step"], row["val/reward"]) == ("0", "0.0")


@pytest.mark.parametrize("sanity", [0, 1])
def test_before_is_not_claimed_without_all_rows(tmp_path, sanity):
    _, records = run(tmp_path, Toy(), 4, sanity=sanity)
    assert validated(records) == [(2, 2.0), (4, 4.0)]
    assert records.samples()[0].step == 2
    assert judge(records.steps(), records.validations()).before is None


def test_validation_outside_fit_is_not_recorded(tmp_path):
    trainer, records = run(tmp_path, Toy(), 2)
    before = validated(records)
    trainer.validate(Toy(), DataLoader(torch.arange(ROWS), batch_size=4), verbose=False)
    assert validated(records) == before


@pytest.mark.parametrize("sanity", [0, -1])
def test_a_fresh_run_in_the_same_folder_forgets_the_earlier_one(tmp_path, sanity):
    run(tmp_path, Toy(), 6)
    _, records = run(tmp_path, Toy(), 3, sanity=sanity)
    assert [record.step for record in records.steps()] == [1, 2, 3]
    assert [step for step, _ in validated(records)] == ([0, 2] if sanity else [2])


def test_a_resumed_run_continues_the_records_and_the_clock(tmp_path):
    saver = ModelCheckpoint(tmp_path / "checkpoints", every_n_train_steps=3, save_top_k=-1, filename="{step}")
    run(tmp_path, Toy(), 5, saver)
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 6, "objective"')  # killed while writing
    checkpoint = tmp_path / "checkpoints" / "step=3.ckpt"
    state = torch.load(checkpoint, weights_only=False)
    state["callbacks"]["RunRecorder"]["seconds"] += 1000
    torch.save(state, checkpoint)
    started = json.loads((tmp_path / "run.json").read_text())["started"]
    _, records = run(tmp_path, Toy(), 8, saver, ckpt_path=checkpoint)
    assert [(record.step, record.metrics["reward"]) for record in records.steps()] == [(i, i) for i in range(1, 9)]
    assert [step for step, _ in validated(records)] == [0, 2, 4, 6, 8]
    assert [record.seconds > 1000 for record in records.steps()] == [False] * 3 + [True] * 5
    info = records.info()
    assert info is not None
    assert info.wall_seconds > 1000
    assert info.started == started


def test_an_interrupted_run_has_a_report(tmp_path, capsys):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit):
            run(tmp_path, Toy(stop_at=3, error=KeyboardInterrupt()), 6, ReportWriter())
    finally:
        signal.signal(signal.SIGINT, handler)
    info = RunRecords(tmp_path).info()
    assert info is not None
    assert (info.status, info.steps, info.notes) == ("interrupted", 3, ("Stopped by hand after step 3.",))
    assert "Stopped by hand after step 3." in (tmp_path / "report.html").read_text()
    assert str(tmp_path / "report.html") in capsys.readouterr().out.replace("\n", "")


def test_a_failed_run_has_a_report_and_still_fails(tmp_path):
    with pytest.raises(RuntimeError, match="the judge is gone"):
        run(tmp_path, Toy(stop_at=1, error=RuntimeError("the judge is gone\nat line 3")), 6, ReportWriter())
    info = RunRecords(tmp_path).info()
    assert info is not None
    assert (info.status, info.notes) == ("failed", ("Stopped after step 1 by RuntimeError: the judge is gone",))
    assert "the judge is gone" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("stop_at", [0, 1])
def test_only_a_run_with_a_step_is_offered_a_replay(tmp_path, capsys, stop_at):
    with pytest.raises(RuntimeError, match="the judge is gone"):
        run(tmp_path, Toy(stop_at=stop_at, error=RuntimeError("the judge is gone")), 6, ReportWriter())
    assert ("mezo replay" in capsys.readouterr().out) == (stop_at > 0)


def test_a_report_that_fails_does_not_hide_the_error(tmp_path, capsys):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(RuntimeError, match="the judge is gone"):
        run(tmp_path, Toy(stop_at=1, error=RuntimeError("the judge is gone")), 6, ReportWriter())
    assert "The report could not be written" in capsys.readouterr().out


def test_an_error_before_training_leaves_an_earlier_run_alone(tmp_path):
    run(tmp_path, Toy(), 2, ReportWriter())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}

    class Broken(Toy):
        def setup(self, stage):
            raise ValueError("bad configuration")

    with pytest.raises(ValueError, match="bad configuration"):
        run(tmp_path, Broken(), 2, ReportWriter())
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("bar", [None, TQDMProgressBar, RichProgressBar])
def test_the_sample_table_stands_whole_among_progress_bars(tmp_path, capsys, bar):
    _, records = run(tmp_path, Toy(), 4, SampleTable(every_n_validations=2, num_samples=2), bar=bar() if bar else None)
    out = capsys.readouterr().out
    pairs = sample_pairs(records.samples(), "reward")[:2]
    terminal.write(terminal.sample_table(pairs, "step 4"))
    assert capsys.readouterr().out.strip() in out
    assert out.count("before training") == 1
    assert "step 2" not in out
    assert "prompt 1" in out
    assert "prompt 2" not in out
    assert "0.00 > 4.00" in out


def test_where_nothing_is_completed_the_table_has_scores_only(capsys):
    samples = [SampleRecord(step, 0, "p", "", {"loss": 1.0, "accuracy": float(step)}) for step in (0, 1)]
    terminal.write(terminal.sample_table(sample_pairs(samples, "accuracy"), "step 1"))
    out = capsys.readouterr().out
    assert "0.00 > 1.00" in out
    assert "before" not in out


def test_a_loss_of_targets_has_a_table_with_the_targets(capsys):
    samples = [SampleRecord(step, 0, "p", "", {"loss": 2.0 - step}, target=" right\n") for step in (0, 1)]
    terminal.write(terminal.sample_table(sample_pairs(samples, "objective"), "step 1"))
    out = capsys.readouterr().out
    assert all(words in out for words in ("target", " right ", "loss", "2.00 > 1.00"))
    assert "before" not in out


@pytest.mark.parametrize(
    ("transform", "end"), [(Identity(), "a step."), (Clip(2.0), "transform=Clip(limit=2.0) left it.")]
)
def test_what_a_projected_gradient_is_stands_in_the_facts(tmp_path, transform, end):
    model, estimator = Toy(), GuidingVector()
    model.estimator, model.transform = estimator, transform
    info = run(tmp_path, model, 1)[1].info()
    assert info is not None
    assert info.one_slope
    assert info.scalar_meaning is not None
    assert info.scalar_meaning.startswith(estimator.scalar_meaning)
    assert info.scalar_meaning.endswith(end)


@pytest.mark.slow
def test_a_reader_that_has_left_does_not_end_the_run(tmp_path):
    program = """
import sys, time
from mezo_lightning.reporting import terminal
for _ in range(200):
    terminal.write("line " * 100)
open(sys.argv[1], "w").write("still here")
"""
    done = tmp_path / "done"
    child = subprocess.Popen(
        [sys.executable, "-c", program, str(done)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert child.stdout is not None
    child.stdout.readline()
    child.stdout.close()
    child.wait()
    assert done.read_text() == "still here"


def test_the_report_is_announced_with_the_result_and_the_replay_command(tmp_path, capsys):
    _, records = run(tmp_path, Toy(), 4, ReportWriter())
    out = capsys.readouterr().out
    assert "Held-out reward rose from 0.000 to 4.000." in out
    assert f"report: {tmp_path / 'report.html'}" in out
    info = records.info()
    assert info is not None
    assert f"replay: {info.replay_command}" in out


@pytest.mark.parametrize(("flat", "times"), [(True, 1), (False, 0)])
def test_a_flat_reward_is_said_once_while_it_happens(tmp_path, capsys, flat, times):
    run(tmp_path, Toy(flat=flat), 9, FlatRewardWarning(patience=3))
    out = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert out.count("every pair of probes tied") == times


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: SampleTable(every_n_validations=0), "every_n_validations=0"),
        (lambda: SampleTable(num_samples=0), "num_samples=0"),
        (lambda: FlatRewardWarning(patience=0), "patience=0"),
    ],
)
def test_numbers_below_one_are_refused_by_name(make, field):
    with pytest.raises(ValueError, match=field):
        make()


def test_a_completion_cannot_steer_the_terminal_or_write_markup(capsys):
    evil = "\x1b]0;title\x07\x1b[2J\r\u202e"
    samples = [SampleRecord(0, 0, evil, "[bold]x[/bold]", {"reward": 0.0})]
    terminal.write(terminal.sample_table(sample_pairs(samples, "reward"), "step 1"))
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(out)
    assert "[bold]x[/bold]" in out
