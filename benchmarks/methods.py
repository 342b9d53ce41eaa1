"""Methods of the field side by side, each with as many forward passes of a batch as the others.

    python benchmarks/methods.py [--tasks NAME ...] [--methods NAME ...] [--minutes M] [--data DIR]
    python benchmarks/methods.py --table FILE

Learning rates mean something else to each method, so what is tried is a grid of sizes: the RMS change of a coordinate
that moves in the first step, in units of the task's. The learning rate that gives it comes from a few steps whose size
is read from their trajectory. The grid is run on one seed, and its best on three fresh ones.

Each run that was made is a line of benchmarks/results/methods.jsonl, and is not made again. The SST-2 tasks need `make
smollm2` and DIR with SST-2's train.tsv and dev.tsv.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Any

from methods_results import SEEDS, SIZES, TUNING_SEED, Results, Run, Scored, TableRow, heading, plot, table, write

from mezo_lightning import Trajectory
from mezo_lightning.cli import main as mezo
from mezo_lightning.models.pretrained import Pretrained, export
from mezo_lightning.reporting.records import RunRecords

ROOT = Path(__file__).parents[1]
CALIBRATION_LR = 1e-4
HELD_OUT_ROWS, FEWEST_WORDS, MOST_WORDS = 200, 3, 14


@dataclass(frozen=True)
class Method:
    """One row of a table."""

    estimator: str
    probes: int
    """Forward passes of one step."""
    settings: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Parts of the optimizer that are not the usual ones."""


def along(sampler: str, **settings: Any) -> Method:
    """n-SPSA with other directions than Gaussian ones."""
    parts = {"sampler": {"class_path": sampler, "init_args": settings}}
    return Method("CentralDifference", 8, {"num_queries": 4}, parts)


RADEMACHER = {"sampler": {"class_path": "Rademacher"}}
HALF = {"sampler": {"class_path": "Subset", "init_args": {"fraction": 0.5}}}
FIELD = {
    "MeZO": Method("CentralDifference", 2, {"num_queries": 1}),
    "n-SPSA, 4 queries": Method("CentralDifference", 8, {"num_queries": 4}),
    "n-SPSA, 4 queries, Rademacher": Method("CentralDifference", 8, {"num_queries": 4}, RADEMACHER),
    "forward difference, 7 queries": Method("ForwardDifference", 8, {"num_queries": 7}),
    "MeZO-GV, M = 6": Method("GuidingVector", 8, {"pool_size": 6}),
    "MeZO-Greedy, M = 6": Method("GreedyDirection", 8, {"pool_size": 6}),
    "FZOO, 7 queries": Method("FZOO", 8, {"num_queries": 7}, RADEMACHER),
    "ES, 8 members": Method("Population", 8, {"population_size": 8}),
    "ES, 8 members, centred ranks, antithetic": Method(
        "Population", 8, {"population_size": 8, "antithetic": True, "fitness": "centered_rank"}
    ),
    "votes of 4 pairs": Method("Comparison", 8, {"num_queries": 4}),
    "ranking of 8 points": Method("Ranking", 8, {"num_points": 8}),
    "GRZO": Method("GRZO", 2, {}, {"sampler": {"class_path": "Flipout"}}),
    "ConMeZO": Method("Cone", 2, {}, {"update": {"class_path": "Trail"}}),
    "LeZO, half of the layers": Method("CentralDifference", 2, {"num_queries": 1}, HALF),
    "MeZO, momentum": Method("CentralDifference", 2, {"num_queries": 1}, {"update": {"class_path": "Momentum"}}),
    "MeZO, scalar Adam": Method("CentralDifference", 2, {"num_queries": 1}, {"update": {"class_path": "ScalarAdam"}}),
}
# Runs have 16 steps: subspaces that the papers keep for 50 to 1000 steps are kept for 4, so that there are several.
OF_MATRICES = {
    "LOZO, rank 2": along("LowRank", rank=2, refresh_left=0, refresh_right=4),
    "SubZero, rank 16": along("LowRank", rank=16, core="dense", refresh_left=4, refresh_right=4),
    "Sparse-MeZO, a quarter": along("Sparse", fraction=0.25),
    "LeZO, half of the layers, 4 queries": along("Subset", fraction=0.5),
    "TeZO, rank 32": along("LowRank", rank=32, core="diagonal", refresh_left=None, refresh_right=None),
    "EGGROLL, rank 1": along("LowRank", rank=1, refresh_left=0, refresh_right=0),
    "upper layers twice as far": along("Scaled", scales={r"layers\.[23]\.": 2.0}),
}
METHODS = FIELD | OF_MATRICES
# One method of each kind: few or several queries, two chosen directions, normalised one-sided probes.
SHORTLIST = ("MeZO", "n-SPSA, 4 queries", "MeZO-GV, M = 6", "MeZO-Greedy, M = 6", "FZOO, 7 queries")


@dataclass(frozen=True)
class Task:
    """What is tuned, by what, and with how many forward passes."""

    title: str
    configs: tuple[str, ...]
    scored: Scored
    epsilon: float
    unit: float
    """RMS change of a coordinate that moves in the first step, at size 1; it falls linearly to a twentieth."""
    forwards: int
    """Of a run."""
    calibration: int
    """Forward passes of a calibration."""
    validations: int
    methods: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    same_rows: bool = False
    """Whether all runs validate on the same rows, so that it is enough to measure the start once."""

    @property
    def numbers(self) -> str:
        """In a sentence for the table."""
        return (
            f"{self.forwards} forward passes a run (and {self.calibration} a method, once, for the unit of its "
            "learning rate); "
            f"epsilon {self.epsilon:g}, size 1 is {self.unit:g}."
        )


SST2 = {
    # They have little curvature and a gradient that batches of 8 agree on: the loss falls within these few steps.
    "model.pretrained.trainable": r"layers\.2\d\..*norm|model\.norm",
    "data.num_validation": "null",
    "data.batch_size": 8,
    "data.validation_batch_size": 25,
    "model.startup_checks": "false",
}
SST2_SETTING = (
    "SmolLM2-135M-Instruct, the 21 norms of its upper layers (12,096 weights), batches of 8; rows of at most "
    f"{MOST_WORDS} words,\n{HELD_OUT_ROWS} held-out ones of the development set, the same for all runs. Prompt "
)
SST2_LOSS = Task(
    f"## SST-2 by the loss over two options\n\n{SST2_SETTING}`{{sentence}} It was` terrible/great.",
    ("smollm2-135m-sst2.yaml",),
    Scored("accuracy", "loss"),
    epsilon=2e-2,
    unit=1e-2,
    forwards=64,
    calibration=32,
    validations=2,
    methods=SHORTLIST,
    options=SST2,
    same_rows=True,
)
TASKS = {
    "sst2-loss": SST2_LOSS,
    "sst2-accuracy": replace(
        SST2_LOSS,
        title=f"## SST-2 by accuracy as the reward\n\n{SST2_SETTING}`{{sentence}} It was` bad/good,\n"
        'between which it is less one-sided: it says "good" to 86 % of them, and "great" to nearly all.',
        configs=("smollm2-135m-sst2.yaml", "smollm2-135m-sst2-accuracy.yaml"),
        scored=Scored("reward", "reward"),
        epsilon=0.1,
        options={**SST2, "data.options": '[" bad", " good"]'},
    ),
    "quickstart": Task(
        "## The demo: F1 of short answers as the reward\n\n"
        "configs/quickstart.yaml (biases and norms of the embedded OPT), batches of 32, 200 held-out rows.",
        ("quickstart.yaml",),
        Scored("reward", "reward"),
        epsilon=5e-2,
        unit=1.08e-2,
        forwards=200,
        calibration=48,
        validations=5,
        methods=tuple(FIELD),
    ),
    "matrices": Task(
        "## The demo by matrices: directions of low rank, and parts of the weights\n\n"
        "The demo's reward and rows; `out_proj` of the four attentions is tuned, a matrix of 128 x 128 in each layer\n"
        "(65,536 weights). All but MeZO-GV are n-SPSA with 4 queries: of the methods they are named for, they have\n"
        "the directions only. LOZO and SubZero draw new subspaces every 4 steps, TeZO has one for the whole run.",
        ("quickstart.yaml",),
        Scored("reward", "reward"),
        epsilon=1e-2,
        unit=4e-3,
        forwards=128,
        calibration=32,
        validations=2,
        methods=("n-SPSA, 4 queries", *OF_MATRICES, "MeZO-GV, M = 6"),
        options={"model.pretrained.trainable": r"out_proj\.weight", "model.startup_checks": "false"},
    ),
}


def prepare(data: Path, runs: Path) -> dict[str, Any]:
    """SmolLM2 as a folder, which loads at once, and the short rows of SST-2: the options that name them."""
    model, train, held_out = runs / "smollm2", runs / "sst2-train.tsv", runs / "sst2-held-out.tsv"
    runs.mkdir(parents=True, exist_ok=True)
    if not model.exists():
        pretrained = Pretrained("smollm2")
        export(pretrained.load(), pretrained.load_tokenizer(), model)
    save_rows(short_rows(data / "train.tsv"), train)
    drawn = random.Random(0).sample(short_rows(data / "dev.tsv"), HELD_OUT_ROWS)
    save_rows(sorted(drawn, key=len), held_out)  # batches of rows of one length hold little padding
    return {"model.pretrained.name": model, "data.train": train, "data.validation": held_out}


def short_rows(file: Path) -> list[str]:
    """The lines of sentences of few words, each with its label."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [line for line in lines if FEWEST_WORDS <= len(line.split("\t")[0].split()) <= MOST_WORDS]


def save_rows(lines: Iterable[str], file: Path) -> None:
    file.write_text("\n".join(("sentence\tlabel", *lines)) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Bench:
    """Makes runs.

    Args:
        results: Where they are stored.
        folder: For the files of the run that is being made.
        sources: Options that say where model and data of the SST-2 tasks are.
    """

    results: Results
    folder: Path
    sources: dict[str, Any]

    def calibrated(self, task: str, method: str) -> Run:
        """The run from which a method's learning rates come; made unless there is one."""
        return self.results.find(task, method, None, TUNING_SEED) or self._run(task, method, None, CALIBRATION_LR)

    def run(self, task: str, method: str, size: float, seed: int) -> Run:
        """One run with steps of a size."""
        change = self.calibrated(task, method).change
        assert change is not None
        return self._run(task, method, size, size * TASKS[task].unit / change * CALIBRATION_LR, seed)

    def _run(self, name: str, method: str, size: float | None, lr: float, seed: int = TUNING_SEED) -> Run:
        task = TASKS[name]
        start = self.results.start(name) if task.same_rows else None
        steps = (task.forwards if size else task.calibration) // METHODS[method].probes
        options = {**self._options(task, METHODS[method], seed, lr, steps), **_schedule(task, steps, size, start)}
        words = ["fit", *(f"--config={ROOT / 'configs' / config}" for config in task.configs)]
        shutil.rmtree(self.folder, ignore_errors=True)
        began = time.perf_counter()
        with redirect_stdout(sys.stderr):
            mezo([*words, *(f"--{option}={value}" for option, value in options.items())])
        records = RunRecords(self.folder)
        asked = {len(record.objective) for record in records.steps() if record.objective}  # none where pairs are judged
        assert asked <= {METHODS[method].probes}, f"{method} made steps of {asked} probes"
        curve = [(record.step, record.metrics) for record in records.validations()]
        ties = [record.tie_fraction for record in records.steps() if not math.isnan(record.tie_fraction)]
        run = Run(
            *(name, method, size, seed, lr, steps),
            change=change(self.folder),
            skipped=sum(record.skipped is not None for record in records.steps()),
            ties=fmean(ties) if ties else 1.0,
            curve=[(0, start), *curve] if start and size else curve,
            seconds=round(time.perf_counter() - began, 1),
            day=str(date.today()),
        )
        self.results.add(run)
        shutil.rmtree(self.folder)
        gc.collect()
        return run

    def _options(self, task: Task, method: Method, seed: int, lr: float, steps: int) -> dict[str, Any]:
        options = {
            **task.options,
            **(self.sources if task.same_rows else {}),
            "run_dir": self.folder,
            "seed_everything": seed,
            "model.estimator": estimator(method, task.epsilon),
            "model.max_skipped_steps": 1000,
            "model.optimizer.init_args.lr": lr,
            "trainer.max_steps": steps,
            "trainer.logger": "false",
            "trainer.enable_progress_bar": "false",
            "checkpoint.monitor": "null",
            "checkpoint.save_top_k": 0,
            "checkpoint.save_last": "false",
        }
        parts = {f"model.optimizer.init_args.{name}": json.dumps(part) for name, part in method.optimizer.items()}
        return options | parts


def _schedule(task: Task, steps: int, size: float | None, start: dict[str, float] | None) -> dict[str, Any]:
    """Calibrations keep their learning rate and validate at the start at most."""
    validate_start = start is None and (size or task.same_rows)
    return {
        "model.lr_scheduler.init_args.end_factor": 0.05 if size else 1.0,
        "model.lr_scheduler.init_args.total_iters": steps,
        "trainer.val_check_interval": max(1, steps // task.validations) if size else steps + 1,
        "trainer.num_sanity_val_steps": -1 if validate_start else 0,
    }


def estimator(method: Method, epsilon: float) -> str:
    """As JSON, for the command line."""
    return json.dumps({"class_path": method.estimator, "init_args": {"epsilon": epsilon, **method.settings}})


def change(folder: Path) -> float | None:
    """The RMS change of a coordinate that moves, in a step that changes any: there directions have unit variance.

    Directions that leave out layers or weights thus have the size of what they move, and over all coordinates the root
    of its share as much; with ``Scaled`` it is the size where the scale is 1.
    """
    with Trajectory.open(folder) as trajectory:
        sizes = [math.sqrt(math.fsum(c[0] ** 2 for _, c in step.terms)) for step in trajectory]
    moved = [size for size in sizes if size > 0]
    return median(moved) if moved else None


def compare(bench: Bench, task: str, method: str, stop_at: float) -> None:
    """Make the runs that a row of the table needs and that were not made yet."""
    if bench.calibrated(task, method).change is None:
        return
    while time.monotonic() < stop_at:
        row = TableRow.of(task, method, TASKS[task].scored, bench.results)
        seeds = [seed for seed in SEEDS if seed not in row.fresh]
        if row.untried is not None:
            run = bench.run(task, method, row.untried, TUNING_SEED)
        elif row.best is not None and seeds:
            run = bench.run(task, method, row.best, seeds[0])
        else:
            return
        shown = [round(metrics[TASKS[task].scored.shown], 3) for _, metrics in run.curve]
        print(task, method, f"size {run.size:g}, seed {run.seed}: {shown}, {run.seconds:.0f} s", flush=True)


def present(results: Results, file: Path) -> None:
    """Write the table, and the plot beside it."""
    probes = {name: method.probes for name, method in METHODS.items()}
    sections, panels = [heading(results, "benchmarks/methods.py")], {}
    for name, task in TASKS.items():
        rows = [TableRow.of(name, method, task.scored, results) for method in METHODS]
        if rows := [row for row in rows if row.tried or row.silent]:
            sections.append(table(f"{task.title}\n{task.numbers}", probes, rows, task.scored))
        if any(row.fresh for row in rows):
            panels[task.title.splitlines()[0].partition(":")[0].strip("# ")] = (task.scored, rows, probes)
    image = file.with_suffix(".png")
    plot(panels, image)
    caption = "Held-out metrics by forward passes, medians; and at the end, for each seed"
    write(file, "\n".join([*sections, f"![{caption}]({image.name})\n"]))


def budget(tasks: Sequence[str], methods: Sequence[str]) -> str:
    """What all runs cost together, in words."""
    most = {task: len(set(methods) & set(TASKS[task].methods)) for task in tasks}
    runs = len(SIZES) + 2 + len(SEEDS)  # two sizes lie between the grid and either limit
    return "; ".join(
        f"{task}: {count} methods, at most {runs} runs of {TASKS[task].forwards} forward passes each "
        f"({count * runs * TASKS[task].forwards} in all)"
        for task, count in most.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS), metavar="NAME")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=math.inf, help="no run begins after so many minutes")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "sst2")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-methods"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "methods.jsonl")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="run nothing; write the table, and the plot beside it"
    )
    args = parser.parse_args()
    results, stop_at = Results(args.results), time.monotonic() + 60 * args.minutes
    if args.table is not None:
        present(results, args.table)
        return
    print(budget(args.tasks, args.methods), flush=True)
    sources = prepare(args.data, args.runs) if any(TASKS[task].same_rows for task in args.tasks) else {}
    args.runs.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=args.runs) as folder:  # of its own: several of these may run side by side
        bench = Bench(results, Path(folder) / "run", sources)
        for task in args.tasks:
            for method in TASKS[task].methods:
                if method in args.methods and time.monotonic() < stop_at:
                    compare(bench, task, method, stop_at)


if __name__ == "__main__":
    main()
