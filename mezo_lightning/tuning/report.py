"""What ``mezo tune`` shows: advice with its reasons, a table, and a picture of the measurements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.markup import escape
from rich.table import Table

from mezo_lightning.tuning.measuring import MANY_TIES, BatchNoise, Curvature, Tuning
from mezo_lightning.tuning.units import Units

_PLAIN = Units()
_BLUE, _ORANGE, _GREY = "#2563eb", "#d97706", "#6b7280"


@dataclass(frozen=True)
class Advice:
    """One recommendation."""

    option: str
    """What to set."""
    value: str
    """To what."""
    reason: str


def advise(tuning: Tuning, units: Units = _PLAIN) -> tuple[Advice, ...]:
    """What to set, and why.

    Args:
        tuning: The measurements.
        units: Of the run; where its learning rate is not in those of plain MeZO, the size of a step is advised instead.
    """
    return _epsilon(tuning), _learning_rate(tuning, units), _what_to_raise(tuning)


def options(tuning: Tuning, units: Units = _PLAIN) -> str:
    """What is advised, as options of ``mezo fit``; what it has no option or no number for is left out.

    Args:
        tuning: The measurements.
        units: Of the run.
    """
    paths = {"epsilon": "model.estimator.init_args.epsilon", "lr": "model.optimizer.init_args.lr"}
    known = [one for one in advise(tuning, units) if one.option in paths and one.value != "n/a"]
    return " ".join(f"--{paths[one.option]} {one.value}" for one in known)


def table(tuning: Tuning, units: Units = _PLAIN) -> Table:
    """The measurements and the advice, for a terminal.

    Args:
        tuning: The measurements.
        units: Of the run.
    """
    made = Table(title="What forward passes say", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    made.add_column("measured", no_wrap=True)
    made.add_column("value", justify="right", no_wrap=True)
    made.add_column("meaning", overflow="fold")
    for row in (_directions(units), *_rows(tuning)):
        made.add_row(*row)
    made.add_section()
    for advice in advise(tuning, units):
        made.add_row(advice.option, advice.value, advice.reason, style="bold")
    return made


def picture(tuning: Tuning) -> Figure:
    """Three drawings side by side: the ladder of epsilons, the curvatures, and the slopes of two batches.

    Args:
        tuning: The measurements.
    """
    figure = Figure(figsize=(13, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _draw_ladder(left, tuning)
    _draw_curvature(middle, tuning.curvature)
    _draw_batches(right, tuning.batches)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure


def _directions(units: Units) -> tuple[str, str, str]:
    if units.measured_along == units.sampler:
        return "directions", units.measured_along, "the run's sampler"
    meaning = f"measured along those; the run's sampler is {escape(units.sampler)}"
    if not units.moves_all_alike:
        meaning += (
            ", which does not move all weights, or not all as far: epsilon and lr are those of directions over all "
            "tuned weights"
        )
    return "directions", units.measured_along, meaning


def _rows(tuning: Tuning) -> list[tuple[str, str, str]]:
    curvature, batches = tuning.curvature, tuning.batches
    low, high = curvature.rank_interval
    usable = [rung.epsilon for rung in tuning.ladder if rung.usable]
    where = f"; rough: at epsilon {_number(curvature.epsilon)} only" if tuning.rough else ""
    return [
        (
            "noise floor",
            _number(tuning.noise_floor),
            "the objective's own error at the advised epsilon: of rounding, chance, or kinks; at most",
        ),
        (
            "usable epsilon",
            f"{_number(usable[0])} to {_number(usable[-1])}" if usable else "none",
            "where slopes are wrong by less than half of what they are",
        ),
        ("slope of a direction", _number(tuning.best.slope), "root mean square; about the gradient's length"),
        (
            "tr(H)",
            f"{_number(curvature.trace)} ± {_number(curvature.trace_error)}",
            "curvature summed over all weights",
        ),
        (
            "effective rank",
            f"{_number(curvature.effective_rank)} ({_number(low)} to {_number(high)})",
            "how many dimensions the curvature has; steps to converge grow with it, not with the number of weights"
            + where,
        ),
        (
            "largest stable lr",
            _number(curvature.largest_stable_lr),
            "2 / (tr(H) + 2 L), L = tr(H) / sqrt(effective rank), both two standard errors higher; for plain MeZO with "
            "one direction per step",
        ),
        ("signal to noise", _number(batches.ratio), "squared gradient that batches share, over what they do not"),
        ("forward passes", f"{tuning.probes:,}", "that all of this took"),
    ]


def _epsilon(tuning: Tuning) -> Advice:
    best = tuning.best
    noise, change = _share(best.noise, best.slope), _share(best.change, best.slope)
    if best.tie_fraction > MANY_TIES:
        reason = f"{best.tie_fraction:.0%} of the samples tie even there: most probes say nothing. A finer reward helps"
    elif not best.usable:
        reason = (
            f"rough: noise is {noise} of a slope, and slopes change by {change} to the next epsilon; MeZO follows the "
            f"objective's average over such distances ({best.tie_fraction:.0%} of the samples tie)"
        )
    else:
        reason = f"as far as slopes can be trusted: noise is {noise} of them, the change to the next epsilon {change}"
    return Advice("epsilon", _number(best.epsilon), reason)


def _learning_rate(tuning: Tuning, units: Units) -> Advice:
    curvature, ratio = tuning.curvature, tuning.batches.ratio
    if not ratio or curvature.largest_trace <= 0:
        why = "no curvature" if ratio else "no gradient that the batches share"
        return Advice("lr", "n/a", f"{why} can be seen: raise what the next line says, or try a grid")
    lr = 1 / (curvature.steepest * (1 + 1 / ratio))
    step = _number(lr * tuning.best.slope)
    if not math.isnan(curvature.largest_stable_lr):
        best = (
            f"1 / ((tr(H) + 2 L) (1 + noise / signal)): the largest decrease per step to rely on. {_bound(curvature)}"
        )
        more = "Curvature may grow in training: a third of it is safer"
    else:
        best = (
            f"cautious: at epsilon {_number(curvature.epsilon)}, tr(H) is lost in noise, or curvature has both signs, "
            f"but tr(H) is hardly above {_number(curvature.largest_trace)}, and no eigenvalue above "
            f"{_number(curvature.largest_eigenvalue)}"
        )
        more = "Try larger ones too"
    if units.other_units:
        parts = " and ".join(f"`{part}`" for part in units.other_units)
        queries = _of_queries(curvature, "sqrt(q)")
        reason = (
            f"root mean square change of a weight by plain MeZO's lr ({best}). With {parts} the same lr makes other "
            "steps: choose one with which each estimate moves the weights about that far in all (the log has it as "
            f"`update_rms`, where it is known); q directions allow {queries} times that. {more}"
        )
        return Advice("RMS step, not lr", step, reason)
    queries = _of_queries(curvature, "q")
    reason = f"{best}; q directions allow {queries} times that. It moves each weight by about {step} a step. {more}"
    return Advice("lr", _number(lr), reason)


def _bound(curvature: Curvature) -> str:
    """What L of the learning rate is."""
    known = not math.isnan(curvature.effective_rank)
    size = "tr(H) / sqrt(effective rank)" if known else "sqrt(tr(H^2)) with its noise, for want of the effective rank,"
    ends = f"{_number(curvature.largest_trace)} and {_number(curvature.largest_eigenvalue)}"
    return f"L = {size} bounds the eigenvalues; tr(H) and L are taken two standard errors higher: {ends}"


def _of_queries(curvature: Curvature, growth: str) -> str:
    """How many times the learning rate, or the size of a step, q directions allow."""
    most = curvature.most_by_queries
    return growth if math.isinf(most) else f"{_number(most)} {growth} / ({_number(most - 1)} + q)"


def _what_to_raise(tuning: Tuning) -> Advice:
    batches = tuning.batches
    own = (tuning.noise_floor / batches.epsilon) ** 2 / 2
    if batches.noise and own > batches.noise / 2:
        return Advice("raise", "epsilon", "the objective's own error outweighs the difference between batches")
    if batches.ratio < 1:
        return Advice(
            "raise",
            "batch size",
            f"a batch's own slope outweighs the shared one (signal to noise {_number(batches.ratio)}): twice the rows "
            "halve that noise",
        )
    return Advice(
        "raise",
        "queries",
        f"batches agree (signal to noise {_number(batches.ratio)}), so what is left is the chance of the direction: "
        "more queries or more steps, and perhaps a smaller batch",
    )


def _draw_ladder(axes: Axes, tuning: Tuning) -> None:
    def shares(of: str) -> list[float]:
        return [getattr(rung, of) / rung.slope if rung.slope else math.nan for rung in tuning.ladder]

    epsilons = [rung.epsilon for rung in tuning.ladder]
    axes.loglog(epsilons, shares("error"), "o-", color=_BLUE, linewidth=4, alpha=0.4, label="both")
    axes.loglog(epsilons, shares("noise"), "--", color=_GREY, label="noise floor")
    axes.loglog(epsilons, shares("change"), ":", color=_ORANGE, linewidth=2, label="change to the next epsilon")
    axes.axhline(0.5, color=_GREY, linewidth=0.8)
    axes.annotate("usable below", (epsilons[0], 0.5), (0, -3), textcoords="offset points", va="top", color=_GREY)
    axes.axvline(tuning.best.epsilon, color=_BLUE, linewidth=6, alpha=0.15, label="advised")
    axes.set(title="Error of a slope, as a share of it", xlabel="epsilon")
    axes.set_ylim(top=max(10.0, axes.get_ylim()[0] * 10))
    axes.legend(frameon=False)


def _draw_curvature(axes: Axes, curvature: Curvature) -> None:
    axes.hist(curvature.along, bins=max(8, len(curvature.along) // 4), color=_BLUE, alpha=0.8, rwidth=0.9)
    axes.axvline(curvature.trace, color=_ORANGE, linewidth=2)
    rank = f"effective rank {_number(curvature.effective_rank)}"
    axes.set(title=f"Curvature along directions: {rank}", xlabel="z' H z; the line is their mean, tr(H)")
    axes.set_ylabel("directions")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_batches(axes: Axes, batches: BatchNoise) -> None:
    slopes = np.array(batches.slopes)
    others = np.array([np.delete(slopes, batch, axis=0).mean(0) for batch in range(len(slopes))])
    reach = float(np.abs(slopes).max()) or 1.0
    axes.plot([-reach, reach], [-reach, reach], color=_GREY, linewidth=0.8)
    axes.plot(others.ravel(), slopes.ravel(), "o", color=_BLUE, alpha=0.5, markeredgewidth=0)
    labels: dict[str, Any] = {"xlabel": "slope on the other batches", "ylabel": "slope on one batch"}
    axes.set(title=f"Do batches agree? Signal to noise {_number(batches.ratio)}", **labels)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else "all"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else "inf"
    return f"{value:.3g}"
