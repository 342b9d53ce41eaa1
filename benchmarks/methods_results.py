"""What benchmarks/methods.py has measured: one JSON line a run, the size that tuning chose, the table and the plot."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

SIZES = (0.5, 1.0, 2.0)
"""Of a step: the RMS change of a coordinate that moves in the first one, in units of the task's."""
SMALLEST, LARGEST = 0.125, 8.0
"""As long as the best size is at an end of what was tried, the one beyond it is tried too, up to these."""
TUNING_SEED, SEEDS = 0, (1, 2, 3)
STYLES, MARKERS = ("-", "--", ":"), ("o", "s", "^")
"""Of lines in a plot: each is for ten methods, for there are ten colours."""
LEAST_SPAN = 0.1
"""Of a plot's axis, or differences of one row would look large."""
REMARKS = "## What it says"
"""From this line on, a file of results is written by hand."""


@dataclass(frozen=True)
class Run:
    """One run, as it is stored."""

    task: str
    method: str
    size: float | None
    """None: a short run at a small learning rate, from which the learning rate of a size is read."""
    seed: int
    lr: float
    steps: int
    change: float | None
    """Median RMS change of a coordinate that moves, in a step that changes any; None where all probes tied."""
    skipped: int
    """Steps without an estimate."""
    ties: float
    """Share of the samples with the same value at both probes of a pair."""
    curve: list[tuple[int, dict[str, float]]]
    """Held-out metrics by step, from 0; empty where nothing was validated."""
    seconds: float
    day: str


class Results:
    """The runs that were made.

    Args:
        file: One JSON line a run; it need not exist.
    """

    def __init__(self, file: Path):
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self.runs = [Run(**json.loads(line)) for line in lines]

    def find(self, task: str, method: str, size: float | None, seed: int) -> Run | None:
        """The run, if it was made."""
        asked = (task, method, size, seed)
        return next((run for run in self.runs if (run.task, run.method, run.size, run.seed) == asked), None)

    def start(self, task: str) -> dict[str, float] | None:
        """Held-out metrics before any step, of a run that has them; None if there is none."""
        return next((run.curve[0][1] for run in self.runs if run.task == task and run.curve), None)

    def add(self, run: Run) -> None:
        """Store a run."""
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(run)) + "\n")
        self.runs.append(run)


@dataclass(frozen=True)
class Scored:
    """What a task's held-out metrics are compared by."""

    shown: str
    """The metric of the table and the plot; higher is better."""
    tuned_by: str
    """The metric that chooses the size of steps: the same, or "loss", of which lower is better."""

    def fitness(self, run: Run) -> float:
        """What tuning makes as large as it can: of the last weights."""
        value = run.curve[-1][1][self.tuned_by]
        return -value if self.tuned_by == "loss" else value


@dataclass(frozen=True)
class TableRow:
    """One method on one task, as far as its runs were made."""

    method: str
    tried: dict[float, Run]
    """Runs on the tuning seed, by size."""
    best: float | None
    """The size for the fresh seeds; None as long as a size is to be tried."""
    untried: float | None
    """The size to try next."""
    fresh: dict[int, Run]
    """Runs at the best size, by seed."""
    silent: bool = False
    """Whether all probes of the calibration tied, so that no learning rate gives a size."""

    @staticmethod
    def of(task: str, method: str, scored: Scored, results: Results) -> TableRow:
        """What the runs so far say, and what is to be run next."""
        made = [run for run in results.runs if (run.task, run.method, run.seed) == (task, method, TUNING_SEED)]
        tried = {run.size: run for run in sorted(made, key=lambda run: run.size or 0) if run.size is not None}
        untried = next((size for size in SIZES if size not in tried), None)
        if untried is not None:
            calibration = results.find(task, method, None, TUNING_SEED)
            silent = calibration is not None and calibration.change is None
            return TableRow(method, tried, None, untried, {}, silent)
        best = max(tried, key=lambda size: scored.fitness(tried[size]))
        beyond = {min(tried): best / 2, max(tried): best * 2}.get(best)
        if beyond is not None and SMALLEST <= beyond <= LARGEST:
            return TableRow(method, tried, None, beyond, {})
        found = {seed: results.find(task, method, best, seed) for seed in SEEDS}
        return TableRow(method, tried, best, None, {seed: run for seed, run in found.items() if run is not None})

    def values(self, metric: str, choose: Callable[[Sequence[float]], float]) -> list[float]:
        """One value of each fresh seed, such as the last or the largest of its curve."""
        return [choose([metrics[metric] for _, metrics in run.curve]) for run in self.fresh.values()]


def last(values: Sequence[float]) -> float:
    """Of a curve: the weights at the end."""
    return values[-1]


def spread(values: Sequence[float]) -> str:
    """The median, and the range."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"


def table(title: str, probes: dict[str, int], rows: Sequence[TableRow], scored: Scored) -> str:
    """One task's section.

    Args:
        title: Its heading, and what is to be said of it.
        probes: Forward passes of a step, by method.
        rows: What was measured.
        scored: What it is compared by.
    """
    begun = [run for row in rows for run in row.fresh.values()] or [r for row in rows for r in row.tried.values()]
    start = median(run.curve[0][1][scored.shown] for run in begun)
    loss = scored.tuned_by == "loss"
    lines = [
        f"{title}\n",
        "| method | probes a step | steps | size | lr | ties | skipped "
        + f"| last {scored.shown} (from {start:.3f}) | best |"
        + (" last loss |" if loss else "")
        + f" sizes tried, last {scored.tuned_by} |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|" + ("--:|" if loss else "") + "---|",
    ]
    for row in rows:
        if row.silent:
            lines.append(f"| {row.method} | {probes[row.method]} | no step: all probes of the calibration tied |")
            continue
        grid = ", ".join(f"{size:g}: {run.curve[-1][1][scored.tuned_by]:.3f}" for size, run in row.tried.items())
        some = list(row.fresh.values()) or list(row.tried.values())
        cells = [row.method, str(probes[row.method]), str(some[0].steps)]
        cells += [f"{row.best:g}" if row.best else "-", f"{some[0].lr:.2g}" if row.best else "-"]
        cells += [
            f"{median(run.ties for run in some):.0%}",
            f"{sum(r.skipped for r in some) / sum(r.steps for r in some):.0%}",
        ]
        cells += [spread(row.values(scored.shown, last)), spread(row.values(scored.shown, max))]
        cells += [spread(row.values("loss", last))] if loss else []
        unfinished = "" if len(row.fresh) == len(SEEDS) else f" ({len(row.fresh)} of {len(SEEDS)} seeds so far)"
        lines.append("| " + " | ".join([*cells, grid + unfinished]) + " |")
    return "\n".join(lines) + "\n"


def heading(results: Results, command: str) -> str:
    """What is above all tables."""
    days = sorted({run.day for run in results.runs})
    hours = sum(run.seconds for run in results.runs) / 3600
    return (
        "# Methods at equal forward passes\n\n"
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}, CPU, one thread, torch {torch.__version__}, Python "
        f"{platform.python_version()}\n"
        f"`OMP_NUM_THREADS=1 python {command}`: {len(results.runs)} runs, {hours:.1f} hours; "
        f"`python {command} --table FILE` made table and plot\n\n"
        "All methods of a task make the same number of forward passes of a batch. The size of a step is the RMS change "
        "in the first one of a coordinate\nthat moves (directions that leave out layers or weights change a coordinate "
        "less, on average over all); it falls linearly to a twentieth.\nSizes are tried on "
        f"seed {TUNING_SEED} ({', '.join(f'{size:g}' for size in SIZES)}, and where the best is at an end, the "
        f"next, from {SMALLEST:g} to {LARGEST:g}), the best runs on seeds "
        f"{', '.join(map(str, SEEDS))}: the median (lowest to\nhighest) of the last weights, and of the best that each "
        "run saw. The best size is that of the best last held-out value, of seed "
        f"{TUNING_SEED} alone;\nits held-out rows are those of the other seeds (SST-2), or overlap with them (the demo "
        "draws 200 of 494 for each seed). `ties`: samples with\nthe same value at both probes of a pair; `skipped`: "
        "steps without an estimate. All runs are in methods.jsonl.\n"
    )


def write(file: Path, text: str) -> None:
    """Put the tables into a file, whose remarks stay."""
    remarks = file.read_text(encoding="utf-8").partition(REMARKS)[2] if file.exists() else ""
    file.write_text(text + (f"\n{REMARKS}{remarks}" if remarks else ""), encoding="utf-8")


def plot(panels: dict[str, tuple[Scored, Sequence[TableRow], dict[str, int]]], file: Path) -> None:
    """Two panels a task: the median of the held-out metric by forward passes, and the last value of each seed.

    Args:
        panels: By heading: what is compared, the methods, and the forward passes of their steps.
        file: The image.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    heights = [max(2.6, 1.0 + 0.26 * sum(bool(row.fresh) for row in rows)) for _, rows, _ in panels.values()]
    figure, axes = pyplot.subplots(
        *(len(panels), 2), figsize=(12, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for (title, (scored, rows, probes)), (curves, ends) in zip(panels.items(), axes, strict=True):
        drawn = [row for row in rows if row.fresh]
        for number, row in enumerate(drawn):
            by_step = list(zip(*(run.curve for run in row.fresh.values()), strict=True))
            x = [points[0][0] * probes[row.method] for points in by_step]
            y = [[metrics[scored.shown] for _, metrics in points] for points in by_step]
            look = {"color": f"C{number % 10}", "marker": MARKERS[number // 10]}
            curves.plot(x, [median(some) for some in y], STYLES[number // 10], markersize=4, **look)
            ends.plot([min(y[-1]), max(y[-1])], [number] * 2, color=look["color"], linewidth=1)
            ends.plot(y[-1], [number] * len(y[-1]), linestyle="none", markersize=5, fillstyle="none", **look)
            ends.plot([median(y[-1])], [number], "|", color=look["color"], markersize=14, markeredgewidth=3)
        ends.margins(y=0.6 / len(drawn))
        for limits, widen in ((curves.get_ylim(), curves.set_ylim), (ends.get_xlim(), ends.set_xlim)):
            middle = sum(limits) / 2
            widen(min(limits[0], middle - LEAST_SPAN / 2), max(limits[1], middle + LEAST_SPAN / 2))
        ends.set_yticks(range(len(drawn)), [row.method for row in drawn], fontsize=8)
        ends.locator_params(axis="x", nbins=6)
        ends.invert_yaxis()
        ends.grid(axis="x", alpha=0.3)
        ends.set(title="at the end: each seed, and the median (bar)", xlabel=f"held-out {scored.shown}")
        curves.set(title=title, xlabel="forward passes of a batch", ylabel=f"held-out {scored.shown}, median")
    figure.savefig(file, dpi=120)
