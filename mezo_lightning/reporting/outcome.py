"""What happened in a run, in plain words: the headline, the figures before and after, and what to try next.

A run must not look as if it trained when it did not. In MeZO a flat reward gives projected gradients of exactly zero,
and noise in the validation can pass for progress: so a change is called one only where it is larger than what so many
validation rows can tell apart (two standard errors; values in [0, 1] of mean p have a variance of at most p (1 - p)).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from mezo_lightning.reporting.records import RunInfo, StepRecord, ValidationRecord

# The figure that a run is judged by: the first of these that was recorded. True: more is better.
HEADLINE_METRICS = {"reward": True, "win_rate": True, "accuracy": True, "objective": False, "loss": False}
_SHARES = ("reward", "win_rate", "accuracy")  # where they are: a reward may have any range
_A_PERSON_SEES = 0.05  # a difference between two shares that looks like a change
FLAT_ADVICE = (
    "What may help: a larger epsilon, sampled completions (temperature > 0), a larger batch or more queries, "
    "a prompt on which the model's answers already vary, a reward with degrees instead of right or wrong, "
    "or the loss of the right option or target as the objective."
)

Verdict = Literal["better", "worse", "unchanged", "nothing", "unknown"]


@dataclass(frozen=True)
class Outcome:
    """The result of a run as `judge` sees it."""

    headline: str
    verdict: Verdict
    metric: str | None
    """Name of the figure the run is judged by; None where nothing was recorded."""
    label: str
    """What a person calls it: F1, not reward, where F1 is the only reward; loss, where nothing else is minimised."""
    maximise: bool
    before: ValidationRecord | None
    after: ValidationRecord | None
    notes: tuple[str, ...]


def judge(steps: Sequence[StepRecord], validations: Sequence[ValidationRecord], info: RunInfo | None = None) -> Outcome:
    """Say what a run achieved, from its records."""
    metric = headline_metric(steps, validations)
    maximise = HEADLINE_METRICS.get(metric or "", True)
    label = _label(metric, steps, validations)
    measured = [record for record in validations if metric and math.isfinite(record.metrics.get(metric, math.nan))]
    before = measured[0] if measured and measured[0].step == 0 else None
    after = measured[-1] if measured and measured[-1].step > 0 else None
    verdict = _verdict(steps, metric, maximise, before, after)
    return Outcome(
        headline=_headline(verdict, label, metric, steps, before, after),
        verdict=verdict,
        metric=metric,
        label=label,
        maximise=maximise,
        before=before,
        after=after,
        notes=(
            *(info.notes if info else ()),
            *_step_notes(steps, bool(measured)),
            *_validation_notes(metric, maximise, label, measured, before),
            *_chance_notes(metric, label, before, after),
        ),
    )


def headline_metric(steps: Sequence[StepRecord], validations: Sequence[ValidationRecord]) -> str | None:
    """The figure a run is judged by: validated if any was, else seen in training."""
    validated = {name for record in validations for name in record.metrics}
    trained = {name for record in steps for name in record.metrics}
    if any(record.objective for record in steps):
        trained.add("objective")
    for names in (validated, trained):
        for name in HEADLINE_METRICS:
            if name in names:
                return name
    return None


def training_value(step: StepRecord, metric: str) -> float:
    """The metric of one training step, over its batch and probes; NaN where there is none."""
    if metric in step.metrics:
        return step.metrics[metric]
    if metric == "objective" and step.objective:
        return fmean(step.objective.values())
    return math.nan


def compares(steps: Sequence[StepRecord]) -> bool:
    """Whether samples were compared with one another, by an oracle, and have no values."""
    return any("preference" in step.metrics for step in steps)


def is_flat(step: StepRecord) -> bool:
    """Whether a step was taken but moved nothing, because all its pairs of probes tied."""
    return step.skipped is None and all(value == 0 for value in step.projected_grads)


def flat_note(flat: int, of: int) -> str:
    """The sentence about pairs of probes that tie."""
    where = f"all {of}" if flat == of else f"{flat} of {of}"
    return (
        f"In {where} steps every pair of probes tied: the projected gradient was exactly 0 "
        f"and the weights did not move. {FLAT_ADVICE}"
    )


def number(value: float) -> str:
    """A figure as it is shown to a person."""
    if not math.isfinite(value):
        return "n/a"
    if value == 0 or 0.001 <= abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _label(metric: str | None, steps: Sequence[StepRecord], validations: Sequence[ValidationRecord]) -> str:
    last = (validations or steps)[-1].metrics if (validations or steps) else {}
    parts = [name for name in last if name.startswith("rewards/") and name.count("/") == 1]
    if metric == "win_rate":
        return "win rate against the start"
    if metric == "reward" and len(parts) == 1 and last[parts[0]] == last.get("reward"):
        name = parts[0].removeprefix("rewards/").replace("_", " ")
        return name.upper() if len(name) <= 3 else name
    if metric == "objective" and math.isclose(last.get("objective", math.nan), last.get("loss", math.nan)):
        return "loss"
    return metric or "objective"


def _verdict(
    steps: Sequence[StepRecord],
    metric: str | None,
    maximise: bool,
    before: ValidationRecord | None,
    after: ValidationRecord | None,
) -> Verdict:
    if all(step.skipped is not None or is_flat(step) for step in steps):
        return "nothing"
    if metric is None or before is None or after is None:
        return "unknown"
    gain = (after.metrics[metric] - before.metrics[metric]) * (1 if maximise else -1)
    if abs(gain) <= resolution(metric, before, after):
        return "unchanged"
    return "better" if gain > 0 else "worse"


def resolution(metric: str, one: ValidationRecord, other: ValidationRecord) -> float:
    """The smallest difference between two validations that is taken for more than chance.

    A win rate of 0.5 at the start is no estimate; but were the model no better now, each vote would be a coin's, whose
    variance is that of p = 0.5, and less with ties.
    """
    values, rows = (one.metrics[metric], other.metrics[metric]), _fewest_rows(metric, one, other)
    if rows and _are_shares(metric, *values):
        return 2 * math.sqrt(max(max(value * (1 - value) for value in values), 1 / rows) / rows)
    return 0.005 * max(abs(value) for value in values)


def _are_shares(metric: str, *values: float) -> bool:
    return metric in _SHARES and all(0 <= value <= 1 for value in values)


def _fewest_rows(metric: str, *records: ValidationRecord) -> int:
    """How many rows the smaller of some validations is over; 0 where that is not known."""
    return min((rows for record in records if (rows := rows_behind(record, metric))), default=0)


def _too_few_rows(metric: str, one: ValidationRecord, other: ValidationRecord) -> int | None:
    """The number of rows, where more of them might have made a difference that a person sees one that counts."""
    values = (one.metrics[metric], other.metrics[metric])
    seen = _are_shares(metric, *values) and abs(values[0] - values[1]) >= _A_PERSON_SEES
    hidden = abs(values[0] - values[1]) <= resolution(metric, one, other)
    return _fewest_rows(metric, one, other) if seen and hidden else None


def rows_behind(record: ValidationRecord, metric: str) -> int | None:
    """How many rows a figure is a mean over, where that is known: a win rate may not be there for all of them."""
    return None if record.rows is None else round(record.rows * record.metrics.get(f"{metric}/known", 1.0))


def _headline(
    verdict: Verdict,
    label: str,
    metric: str | None,
    steps: Sequence[StepRecord],
    before: ValidationRecord | None,
    after: ValidationRecord | None,
) -> str:
    if not steps:
        return "No step was taken."
    if verdict == "nothing":
        return f"Nothing was learned: {_why_nothing(steps)}."
    if metric is None or after is None:
        return f"{_count(len(steps), 'step')} taken, and not measured on held-out rows since: no result yet."
    now = number(after.metrics[metric])
    if before is None:
        return f"Held-out {label} is {now}; what it was before training was not measured."
    was = number(before.metrics[metric])
    if verdict == "unchanged" and (rows := _too_few_rows(metric, before, after)):
        return f"Too few held-out rows ({rows}) to tell: {label} was {was} before and is {now} now."
    if verdict == "unchanged":
        return f"No measurable change: held-out {label} was {was} before and is {now} now."
    verb = "rose" if after.metrics[metric] > before.metrics[metric] else "fell"
    worse = "It got worse: held" if verdict == "worse" else "Held"
    return f"{worse}-out {label} {verb} from {was} to {now}."


def _why_nothing(steps: Sequence[StepRecord]) -> str:
    skipped = sum(step.skipped is not None for step in steps)
    if skipped == len(steps):
        return f"all {_count(len(steps), 'step')} were skipped" if skipped > 1 else "the only step was skipped"
    tied = f"in all {len(steps) - skipped} steps that were not skipped" if skipped else f"in all {len(steps)} steps"
    return f"{tied} every pair of probes tied, so the weights never moved"


def _step_notes(steps: Sequence[StepRecord], measured: bool) -> list[str]:
    notes = []
    skipped = Counter(step.skipped for step in steps if step.skipped is not None)
    taken = [step for step in steps if step.skipped is None]
    flat = sum(is_flat(step) for step in taken)
    if skipped:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in skipped.most_common(5))
        notes.append(f"{sum(skipped.values())} of {_count(len(steps), 'step')} skipped: {reasons}.")
    if compares(steps) and not measured:
        notes.append(
            "A vote says which of two probes is better, and nothing of the model as it is: win_rate: true in the "
            "PreferenceObjective has the oracle compare it at validations with what it was before."
        )
    if flat >= 0.2 * len(steps) and flat:
        notes.append(flat_note(flat, len(steps)))
    valid = _mean([step.valid_fraction for step in taken])
    if valid < 0.9995:
        notes.append(f"{1 - valid:.1%} of the samples were left out because their reward failed at some probe.")
    tied = _mean([step.tie_fraction for step in taken])
    if tied >= 0.9 and flat < len(taken):
        identical = _mean([math.nan if s.identical_fraction is None else s.identical_fraction for s in taken])
        same = f", and {identical:.0%} of the completions were the same" if math.isfinite(identical) else ""
        notes.append(f"On average {tied:.0%} of the samples tied at both probes of a pair{same}. {FLAT_ADVICE}")
    return notes


def _validation_notes(
    metric: str | None,
    maximise: bool,
    label: str,
    measured: Sequence[ValidationRecord],
    before: ValidationRecord | None,
) -> list[str]:
    if metric is None or not measured:
        return []
    notes = []
    if before is None:
        notes.append("To know what training changed, validate before it: trainer.num_sanity_val_steps=-1.")
    last, rows = measured[-1], rows_behind(measured[-1], metric)
    if rows != last.rows:
        notes.append(
            f"{rows} of {last.rows} held-out rows have a win rate: what the model wrote to the others before the first "
            "step is not known (trainer.num_sanity_val_steps=-1 has it written down), or the oracle had no answer."
        )
    sign = 1 if maximise else -1
    best = max(measured, key=lambda record: sign * record.metrics[metric])
    lost = sign * (best.metrics[metric] - last.metrics[metric])
    if best.step > 0 and lost > resolution(metric, best, last):
        notes.append(
            f"Held-out {label} was best at step {best.step} ({number(best.metrics[metric])}) and ended at "
            f"{number(last.metrics[metric])}. A decaying learning rate or a checkpoint of the best step would keep it."
        )
    return notes


def _chance_notes(
    metric: str | None, label: str, before: ValidationRecord | None, after: ValidationRecord | None
) -> list[str]:
    if metric is None or before is None or after is None or not (rows := _too_few_rows(metric, before, after)):
        return []
    least = number(resolution(metric, before, after))
    return [
        f"With {rows} held-out rows, a difference in {label} of up to {least} can be chance: validate on more rows to "
        "tell smaller ones."
    ]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if math.isfinite(value)]
    return fmean(known) if known else math.nan


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" if number_of == 1 else f"{number_of} {noun}s"
