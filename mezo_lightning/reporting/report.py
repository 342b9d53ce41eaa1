"""`report.html`: what a run did, as one self-contained page for a person.

Made from the records in the run folder alone (`records.py`), so it can be written at any time: at the end of training,
after Ctrl-C, or by hand for a run that was killed. It loads nothing from anywhere: figures are inline SVG, and its
content security policy forbids scripts and requests. Prompts and completions are untrusted text and are escaped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mezo_lightning.reporting import figures
from mezo_lightning.reporting.outcome import (
    HEADLINE_METRICS,
    Outcome,
    compares,
    is_flat,
    judge,
    number,
    rows_behind,
    training_value,
)
from mezo_lightning.reporting.records import RunInfo, RunRecords, SampleRecord, StepRecord, ValidationRecord
from mezo_lightning.reporting.redaction import redact

REPORT_FILE = "report.html"
_MAX_SAMPLES = 12
_PROMPT_TAIL = 320
_TEXT_HEAD = 240


@dataclass(frozen=True)
class Tile:
    """One headline figure."""

    name: str
    value: str
    caption: str = ""


@dataclass(frozen=True)
class Chart:
    """A figure with what is needed to read it."""

    title: str
    keys: tuple[tuple[str, str, str], ...]
    """CSS variable of the colour, shape (`line` or `tick`) and meaning of each series."""
    caption: str
    wide: Markup
    narrow: Markup
    full_width: bool = False


@dataclass(frozen=True)
class SamplePair:
    """A validation row before training (or at the first validation there is) and at the last one."""

    prompt: str
    target: str | None
    """What should have been answered, where that is known."""
    before: str
    now: str | None
    """None where the row was completed only once."""
    notes_before: tuple[str, ...]
    """What rewards said of the completion."""
    notes_now: tuple[str, ...]
    score_name: str
    """What the scores are: a reward, a win rate, an accuracy, a loss."""
    score_before: str
    score_now: str
    direction: Literal["up", "down", "same"]
    """Up is for the better: a loss that fell."""

    @property
    def better(self) -> str:
        """Which of the two completions was found better, where scores are win rates."""
        if self.now is None or self.score_now == "none":
            return "none"
        return {"up": "now", "down": "before", "same": "tie"}[self.direction]


def write_report(run_dir: str | Path) -> Path:
    """Write `report.html` into a run folder and return its path."""
    folder = Path(run_dir)
    records = RunRecords(folder)
    steps, validations, info = records.steps(), records.validations(), records.info()
    if not steps and not validations and info is None:
        raise FileNotFoundError(
            f"run_dir: {folder} holds no records of a run (steps.jsonl, validation.jsonl, run.json)"
        )
    outcome = judge(steps, validations, info)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = templates.get_template("report.html.j2").render(
        outcome=outcome,
        info=info,
        run_name=folder.resolve().name,
        tiles=_tiles(folder, steps, outcome, info),
        charts=_charts(steps, validations, outcome, info),
        samples=sample_pairs(records.samples(), outcome.metric)[:_MAX_SAMPLES],
        trajectory=_trajectory(folder, steps),
        config=_config(folder),
        replayable=bool(steps),
        prompt_tail=prompt_tail,
        text_head=text_head,
    )
    path = folder / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def sample_pairs(samples: Sequence[SampleRecord], metric: str | None) -> list[SamplePair]:
    """Each sampled row at its first and its last validation; none where there is nothing to show but prompts."""
    rows: dict[int, list[SampleRecord]] = {}
    for sample in samples:
        rows.setdefault(sample.index, []).append(sample)
    pairs = [_pair(row[0], row[-1], metric) for row in rows.values()]
    told = any(pair.before or pair.now or (pair.score_before, pair.score_now) != ("none", "none") for pair in pairs)
    return pairs if told else []


def prompt_tail(prompt: str, length: int = _PROMPT_TAIL) -> str:
    """The end of a prompt, where the question is; cut at a word."""
    if len(prompt) <= length:
        return prompt
    return "… " + prompt[-length:].split(" ", 1)[-1]


def text_head(text: str, length: int = _TEXT_HEAD) -> str:
    """The beginning of a text that may be long."""
    return text if len(text) <= length else text[:length] + " …"


def note_text(name: str, note: float | str) -> str:
    """What a reward said beside a value, cut where it is long."""
    return f"{name}: {text_head(note if isinstance(note, str) else number(note))}"


def duration(seconds: float) -> str:
    """A time span as a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: float) -> str:
    """A number of bytes as a person says it."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _pair(first: SampleRecord, last: SampleRecord, metric: str | None) -> SamplePair:
    name = next((name for name in ("reward", metric, "loss") if name in first.metrics), "")
    was, now = first.metrics.get(name, math.nan), last.metrics.get(name, math.nan)
    judged = math.isfinite(was) and math.isfinite(now) and name in HEADLINE_METRICS and _score(was) != _score(now)
    return SamplePair(
        prompt=first.prompt,
        target=None if first.target is None else first.target.strip(),
        before=first.completion,
        now=last.completion if last.step > first.step else None,
        notes_before=_notes(first),
        notes_now=_notes(last),
        score_name=name,
        score_before=_score(was),
        score_now=_score(now),
        direction="same" if not judged else "up" if (now > was) == HEADLINE_METRICS[name] else "down",
    )


def _notes(sample: SampleRecord) -> tuple[str, ...]:
    return tuple(note_text(name, note) for name, note in sample.notes.items())


def _score(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}" if math.isfinite(value) else "none"


def _tiles(folder: Path, steps: Sequence[StepRecord], outcome: Outcome, info: RunInfo | None) -> list[Tile]:
    tiles = []
    if outcome.metric and (outcome.before or outcome.after):
        was, now = (number(v.metrics[outcome.metric]) if v else "?" for v in (outcome.before, outcome.after))
        caption = f"mean over {_rows(outcome.after or outcome.before, outcome.metric)} held-out rows"
        caption += "; a tie counts half" if outcome.metric == "win_rate" else ""
        tiles.append(Tile(f"Held-out {outcome.label}", f"{was} → {now}", caption))
    skipped = sum(step.skipped is not None for step in steps)
    planned = info.planned_steps if info else None
    done = steps[-1].step if steps else 0
    of = f" of {planned:,}" if planned and planned != done else ""
    tiles.append(Tile("Steps", f"{done:,}{of}", f"{skipped} skipped" if skipped else "none skipped"))
    if compares(steps):
        asked = sum(step.calls.get("asked", 0.0) for step in steps)
        tiles.append(Tile("Comparisons", f"{asked:,.0f}", "asked for in training; equal texts tie unasked"))
    else:
        probes = sum(len(step.objective) for step in steps)
        tiles.append(Tile("Probes", f"{probes:,}", "of one batch each; no backward pass"))
    if info is not None:
        speed = f"{median(s.probes_per_second for s in steps):.3g} probes a second" if steps else ""
        tiles.append(Tile("Wall time", duration(info.wall_seconds), speed))
        tiles.append(Tile("Peak memory", size(info.peak_memory_bytes), info.device))
        of = f"of {info.parameters:,} parameters, {info.dtype}"
        tiles.append(Tile("Tuned", f"{info.trainable_parameters:,}", of))
    return tiles


def _rows(record: ValidationRecord | None, metric: str) -> str:
    rows = rows_behind(record, metric) if record is not None else None
    if record is None or not rows:
        return "the"
    return f"{rows:,}" if rows == record.rows else f"{rows:,} of {record.rows:,}"


def _charts(
    steps: Sequence[StepRecord], validations: Sequence[ValidationRecord], outcome: Outcome, info: RunInfo | None
) -> list[Chart]:
    charts: list[Chart | None] = []
    shown = {outcome.metric: outcome.label} if outcome.metric else {}
    if outcome.metric == "accuracy":
        shown["objective"] = "objective"  # what was minimised to get there
    if any("kl" in record.metrics for record in (*steps, *validations)):
        shown["kl"] = "KL divergence from the base model"
    for metric, label in shown.items():
        charts.append(_curve(steps, validations, metric, label))
    if steps:
        charts += [_histogram(steps, info), _ties(steps)]
    return [chart for chart in charts if chart is not None]


def _curve(
    steps: Sequence[StepRecord], validations: Sequence[ValidationRecord], metric: str, label: str
) -> Chart | None:
    trained = {step.step for step in steps if step.skipped is None and math.isfinite(training_value(step, metric))}
    measured = {one.step for one in validations if math.isfinite(one.metrics.get(metric, math.nan))}
    if len(trained | measured) < 2:  # one dot is no curve
        return None
    wide, narrow = (figures.curve(steps, validations, metric, width=w, height=h) for w, h in ((1000, 340), (380, 280)))
    keys = [("--accent", "line", "held-out rows")]
    if trained:
        keys.append(("--train", "line", "training batches, running mean"))
    return Chart(
        title=f"{label[0].upper()}{label[1:]} over the steps",
        keys=tuple(keys),
        caption="",
        wide=Markup(wide),
        narrow=Markup(narrow),
        full_width=True,
    )


def _histogram(steps: Sequence[StepRecord], info: RunInfo | None) -> Chart | None:
    of_a_step = slice(1 if info is not None and info.one_slope else None)
    values = [value for step in steps if step.skipped is None for value in step.projected_grads[of_a_step]]
    if not values:
        return None
    zero = sum(value == 0 for value in values)
    drawing = Markup(figures.gradient_histogram(values, width=480, height=280))
    what = info.scalar_meaning if info is not None and info.scalar_meaning else "What a step multiplied directions by."
    shown = f"{len(values):,} values, {zero:,} of them exactly 0; the outer bars hold all beyond the 99th percentile."
    return Chart("Projected gradients", (), f"{what} {shown}", drawing, drawing)


def _ties(steps: Sequence[StepRecord]) -> Chart:
    drawing = Markup(figures.ties(steps, width=480, height=280))
    keys = [("--accent", "line", "samples that tie")]
    if any(step.identical_fraction is not None for step in steps):
        keys.append(("--second", "line", "identical completions"))
    if any(step.skipped is not None for step in steps):
        keys.append(("--warn", "tick", "skipped step"))
    if any(is_flat(step) for step in steps):
        keys.append(("--muted", "tick", "step where all pairs tie"))
    caption = "A sample that is as good at both probes of a pair says nothing about the direction."
    return Chart("How much the probes could tell", tuple(keys), caption, drawing, drawing)


def _trajectory(folder: Path, steps: Sequence[StepRecord]) -> str | None:
    path = folder / "trajectory.bin"
    if not path.exists():
        return None
    return f"{size(path.stat().st_size)} for {len(steps):,} steps"


def _config(folder: Path) -> str | None:
    path = folder / "config.yaml"
    if not path.exists():
        return None
    try:
        return yaml.safe_dump(
            redact(yaml.safe_load(path.read_text(encoding="utf-8"))), sort_keys=False, allow_unicode=True
        )
    except yaml.YAMLError:  # not plain YAML: without its structure secrets cannot be told apart, so none of it is shown
        return None
