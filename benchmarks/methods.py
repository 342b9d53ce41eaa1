"""Methods of the field side by side on the demo's task, each with as many forward passes as the others.

    python benchmarks/methods.py [--forwards 400] [--runs DIR] [--methods NAME ...] [--plot FILE]

The task is configs/quickstart.yaml: F1 of short answers as the reward, held-out F1 as the result. Learning rates mean
something else to each method, so what is tried is a grid of the RMS change of a coordinate in one step, relative to the
demo's own: the learning rate that gives it comes from a few steps whose size is read from their trajectory. The grid is
run on one seed, and its best on three fresh ones. A run that is in DIR already is read, not made again.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import torch

from mezo_lightning import Trajectory
from mezo_lightning.cli import main as mezo
from mezo_lightning.reporting.records import RunRecords

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
EPSILON = 5e-2
GRID = (0.5, 1.0, 2.0)
"""RMS change of a coordinate in a step, in units of the demo's."""
TUNING_SEED, SEEDS = 0, (1, 2, 3)
CALIBRATION_STEPS, CALIBRATION_LR = 6, 1e-4
VALIDATIONS = 5


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    estimator: str
    probes: int
    """Forward passes of one step."""
    settings: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] | None = None


METHODS = {
    "MeZO": Method("CentralDifference", 2),
    "n-SPSA, 4 queries": Method("CentralDifference", 8, {"num_queries": 4}),
    "forward difference, 7 queries": Method("ForwardDifference", 8, {"num_queries": 7}),
    "MeZO-GV, M = 6": Method("GuidingVector", 8, {"pool_size": 6}),
    "MeZO-Greedy, M = 6": Method("GreedyDirection", 8, {"pool_size": 6}),
    "FZOO, 7 queries": Method("FZOO", 8, {"num_queries": 7}, {"class_path": "Rademacher"}),
    "ES, 8 members": Method("Population", 8, {"population_size": 8}),
    "ES, 8 members, centred ranks, antithetic": Method(
        "Population", 8, {"population_size": 8, "antithetic": True, "fitness": "centered_rank"}
    ),
    "votes of 4 pairs": Method("Comparison", 8, {"num_queries": 4}),
    "n-SPSA, 4 queries, Rademacher": Method("CentralDifference", 8, {"num_queries": 4}, {"class_path": "Rademacher"}),
}


def run(method: Method, lr: float, steps: int, seed: int, folder: Path, validate: bool = True) -> None:
    """One run of the demo's task, unless there is one in the folder."""
    if (folder / "done").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    options = {
        "config": str(CONFIG),
        "run_dir": str(folder),
        "seed_everything": seed,
        "model.estimator": json.dumps(
            {"class_path": method.estimator, "init_args": {"epsilon": EPSILON, **method.settings}}
        ),
        "model.optimizer.init_args.lr": lr,
        "model.lr_scheduler.init_args.total_iters": steps,
        "trainer.max_steps": steps,
        "trainer.val_check_interval": max(1, steps // VALIDATIONS),
        "trainer.limit_val_batches": 1.0 if validate else 0,
        "trainer.enable_progress_bar": "false",
        "checkpoint.monitor": "null",
    }
    if method.sampler is not None:
        options["model.optimizer.init_args.sampler"] = json.dumps(method.sampler)
    with redirect_stdout(sys.stderr):
        mezo(["fit", *(f"--{name}={value}" for name, value in options.items())])
    (folder / "done").touch()


def change(folder: Path) -> float:
    """The RMS change of a coordinate in a step, weight decay aside: directions have unit variance."""
    with Trajectory.open(folder) as trajectory:
        sizes = [math.sqrt(sum(c[0] ** 2 for _, c in step.terms)) for step in trajectory if step.terms]
    return median(sizes) if sizes else math.nan


def curve(folder: Path) -> list[tuple[int, float]]:
    """Held-out reward by step."""
    return [(record.step, record.metrics["reward"]) for record in RunRecords(folder).validations()]


def compare(name: str, method: Method, unit: float, forwards: int, runs: Path) -> dict[str, Any]:
    """Tune the size of a method's steps, and measure it on fresh seeds."""
    base = runs / name.replace(" ", "-").replace(",", "").replace("=", "")
    steps = forwards // method.probes
    run(method, CALIBRATION_LR, CALIBRATION_STEPS, TUNING_SEED, base / "calibration", validate=False)
    per_lr = change(base / "calibration") / CALIBRATION_LR
    found = {}
    for factor in GRID:
        folder = base / f"tuning-{factor:g}"
        run(method, factor * unit / per_lr, steps, TUNING_SEED, folder)
        found[factor] = curve(folder)[-1][1]
    best = max(found, key=found.__getitem__)
    curves = []
    for seed in SEEDS:
        run(method, best * unit / per_lr, steps, seed, base / f"seed{seed}")
        curves.append(curve(base / f"seed{seed}"))
    return {"steps": steps, "size": best, "lr": best * unit / per_lr, "grid": found, "curves": curves, "method": method}


def spread(values: list[float]) -> str:
    """The median, and the range."""
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(results: dict[str, dict[str, Any]], file: Path) -> None:
    """Median held-out reward by forward passes, the range over the seeds as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in results.items():
        probes = result["method"].probes
        by_step = list(zip(*result["curves"], strict=True))
        x = [points[0][0] * probes for points in by_step]
        values = [[value for _, value in points] for points in by_step]
        [line] = axes.plot(x, [median(some) for some in values], label=name)
        axes.fill_between(x, list(map(min, values)), list(map(max, values)), alpha=0.1, color=line.get_color())
    axes.set(xlabel="forward passes of a batch", ylabel="held-out F1")
    axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forwards", type=int, default=400, help="forward passes of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-methods"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    reference = METHODS["n-SPSA, 4 queries"]
    run(reference, 2e-2, CALIBRATION_STEPS, TUNING_SEED, args.runs / "unit", validate=False)
    unit = change(args.runs / "unit")
    budget = len(args.methods) * (len(GRID) + len(SEEDS)) * args.forwards
    print("# Methods at equal forward passes, the demo's task\n")
    print(f"{date.today()}, CPU, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"`python benchmarks/methods.py --forwards {args.forwards}`\n")
    print(
        f"{args.forwards} forward passes of a batch of 32 a run, {budget} in all; F1 on 200 held-out rows, the median"
    )
    print(
        f"of {len(SEEDS)} seeds (lowest to highest). One step changes a coordinate by {unit:.2e} times the size, RMS.\n"
    )
    print("| method | probes a step | steps | size | lr | F1 at the start | last | best | sizes tried, last F1 |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    results = {}
    for name in args.methods:
        results[name] = result = compare(name, METHODS[name], unit, args.forwards, args.runs)
        print(
            f"| {name} | {METHODS[name].probes} | {result['steps']} | {result['size']:g} | {result['lr']:.2g} "
            f"| {median(curve[0][1] for curve in result['curves']):.3f} "
            f"| {spread([curve[-1][1] for curve in result['curves']])} "
            f"| {spread([max(value for _, value in curve) for curve in result['curves']])} "
            f"| {', '.join(f'{size:g}: {value:.3f}' for size, value in result['grid'].items())} |",
            flush=True,
        )
    if args.plot is not None:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
