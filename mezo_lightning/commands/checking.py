"""What a reward says of some completions, and what a run would make of it, for a person to read."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mezo_lightning.reporting.outcome import number
from mezo_lightning.reporting.report import note_text, prompt_tail
from mezo_lightning.reporting.terminal import visible
from mezo_lightning.rewarding.answers import Note, Value
from mezo_lightning.rewarding.arguments import OFFERED, Rows
from mezo_lightning.rewarding.asking import Asker
from mezo_lightning.rewarding.conventions import Convention
from mezo_lightning.rewarding.functions import NamedReward
from mezo_lightning.rewarding.log import Tally, described
from mezo_lightning.rewarding.memory import Memory

_TAIL = 110  # characters of a prompt


@dataclass(frozen=True)
class Checked:
    """What one reward said of N rows."""

    reward: NamedReward
    rows: Rows
    values: list[Value]
    """One a row; what is not finite is an exception."""
    beside: list[dict[str, Note]]
    """What the reward said of each row beside its value."""
    said: dict[str, float]
    """Means of the figures that it gave to ``log_metric``, ``log_extra`` or beside a value."""
    seconds: list[float]
    """How long each call took."""
    repeats: int
    """Rows that needed no asking, for another one is the same."""

    @property
    def numbers(self) -> list[float]:
        """The values that are one."""
        return [value for value in self.values if isinstance(value, (int, float))]

    @property
    def failures(self) -> list[Exception]:
        """Why rows failed."""
        return [value for value in self.values if isinstance(value, Exception)]


def ask(reward: NamedReward, rows: Rows) -> Checked:
    """Ask a reward about rows, in the way a run does.

    Args:
        reward: The reward.
        rows: What to ask about.

    Raises:
        ValueError: If the data lacks a column that it needs, or it returns no values.
    """
    reward.check(rows.batch.columns)
    tally = Tally()
    # Not as the first batch of a run, where a reward that fails altogether raises: here that is something to show.
    heard = Asker(reward, Memory(), mask=False, patience=0.0).begin(rows, range(len(rows)), tally)()
    places = range(len(rows))
    beside = [dict(heard.answers[place].notes) if place in heard.answers else {} for place in places]
    values = [heard.answers[place].value if place in heard.answers else heard.failures[place] for place in places]
    return Checked(reward, rows, values, beside, tally.statements(), tally.seconds, tally.remembered)


def described_reward(reward: NamedReward, columns: Collection[str] | None = None) -> Table:
    """How a reward will be called and why, as far as that is known without data.

    Args:
        reward: The reward.
        columns: Those of the data; None where there is none.
    """
    convention = reward.convention
    facts = {
        "convention": f"{convention.name} ({convention.about}): {convention.reason(columns)}",
        "called": "for each row" if convention.per_sample else "once, with all rows",
        "is given": ", ".join(_arguments(convention, columns)),
        "remembered": "yes, a row's value depends on that row alone"
        if reward.per_sample
        else "no, it is asked once a probe: nothing says that a row's value depends on that row alone (per_sample)",
        "runs": _place(reward),
        "on failure": _policy(reward),
        "identity": reward.identity,
    }
    table = Table(
        title=f"Reward {reward.name}",
        title_justify="left",
        title_style="bold",
        box=None,
        show_header=False,
        pad_edge=False,
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, Text(visible(value)))
    return table


def described_values(checked: Checked) -> Group:
    """The values row by row, and what they come to."""
    parts: list[RenderableType] = [_table(checked), Text("")]
    return Group(*parts, *(Text(visible(line)) for line in summary(checked)))


def summary(checked: Checked) -> list[str]:
    """What a run would see, line by line."""
    lines = [_values(checked), _time(checked)]
    empty = sum(value is None for value in checked.values)
    if empty:
        lines.append(f"no opinion (None): {empty} of {_rows(checked)}; there this reward is left out and others count")
    if checked.failures:
        lines.append(f"failed: {len(checked.failures)} of {_rows(checked)}; {_consequence(checked.reward)}")
        causes = Counter(map(described, checked.failures))
        lines += [f"    {count} x {cause}" for cause, count in causes.most_common(5)]
    if nothing := sum(not text for text in checked.rows.completions):
        lines.append(f"empty completions: {nothing} of {_rows(checked)}")
    if checked.said:
        lines.append("logged besides: " + ", ".join(f"{name} {number(mean)}" for name, mean in checked.said.items()))
    if len(checked.numbers) > 1 and len(set(checked.numbers)) == 1:
        lines.append("flat: all values are the same; a run gets no direction from rows like these")
    return lines


# -- parts of it -------------------------------------------------------------------------------------------------------


def _arguments(convention: Convention, columns: Collection[str] | None) -> list[str]:
    """Each argument, and where its value comes from."""
    given = convention.given if columns is None else convention.given_for(columns)
    told = []
    for argument, source in convention.parameters.sources.items():
        there = columns is None or (given[source].available(columns) if source in given else source in columns)
        origin = given[source].about if source in given else "the run" if source in OFFERED else f"column {source}"
        if there or source in OFFERED or argument in convention.parameters.required:
            told.append(f"{argument} ({origin})")
    return [*told, "any name"] if convention.parameters.takes_all else told


def _place(reward: NamedReward) -> str:
    limit = "" if reward.timeout is None else f", at most {reward.timeout:g} s a call"
    if reward.is_async:
        return f"on an event loop, all calls at once{limit}"
    return "here, one call after another" if reward.timeout is None else f"in a process of its own{limit}"


def _policy(reward: NamedReward) -> str:
    masks = reward.on_failure == "mask" or (reward.on_failure is None and reward.remote)
    why = "" if reward.on_failure is not None else ", as it is remote" if reward.remote else ", as it is not remote"
    return f"the sample is left out of the step{why}" if masks else f"the run ends{why} (on_failure: mask goes on)"


def _consequence(reward: NamedReward) -> str:
    masks = reward.on_failure == "mask" or (reward.on_failure is None and reward.remote)
    return "such samples are left out of all probes of a step" if masks else "a run would end at the first"


def _table(checked: Checked) -> Table:
    prompts, completions = checked.rows.batch.prompts, checked.rows.completions
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("row", style="dim", justify="right", no_wrap=True)
    if any(prompts):
        table.add_column("prompt", ratio=3, style="dim", overflow="fold")
    table.add_column("completion", ratio=4, overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    noted = bool(checked.failures) or any(checked.beside)
    if noted:
        table.add_column("beside", ratio=3, overflow="fold")
    for place, value in enumerate(checked.values):
        cells = [Text(str(checked.rows.batch.index[place]))]
        cells += [Text(visible(prompt_tail(prompts[place], _TAIL)))] if any(prompts) else []
        text = completions[place]
        cells += [Text(visible(text)) if text else Text("(empty)", style="dim"), _value(value)]
        cells += [Text(visible(_beside(value, checked.beside[place])))] if noted else []
        table.add_row(*cells)
    return table


def _value(value: Value) -> Text:
    if isinstance(value, Exception):
        return Text("failed", style="red")
    return Text("none", style="dim") if value is None else Text(f"{value:.4g}")


def _beside(value: Value, notes: dict[str, Note]) -> str:
    if isinstance(value, Exception):
        return described(value)
    return "; ".join(note_text(name, note) for name, note in notes.items())


def _values(checked: Checked) -> str:
    values = checked.numbers
    if not values:
        return f"values: none for {_rows(checked)}"
    spread = f", standard deviation {number(statistics.stdev(values))}" if len(values) > 1 else ""
    different = len(set(values))
    return (
        f"values: mean {number(statistics.fmean(values))}{spread}, from {number(min(values))} to "
        f"{number(max(values))}; {different} different {'one' if different == 1 else 'ones'} in {_rows(checked)}"
    )


def _time(checked: Checked) -> str:
    if not checked.seconds:
        return "time: no call was needed"
    slowest, median = max(checked.seconds), statistics.median(checked.seconds)
    calls = f"{len(checked.seconds)} call{'s' if len(checked.seconds) > 1 else ''}"
    same = "one row is the same as another and was"
    if checked.repeats > 1:
        same = f"{checked.repeats} rows are the same as others and were"
    repeated = f"; {same} not asked about again" if checked.repeats else ""
    return f"time: {calls}, median {_duration(median)}, slowest {_duration(slowest)}{repeated}"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _rows(checked: Checked) -> str:
    return f"{len(checked.values)} row{'s' if len(checked.values) != 1 else ''}"
