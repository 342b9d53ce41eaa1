"""The demo's model tuned by three kinds of reward: held-out F1 before and after each.

    python benchmarks/reward_families.py [--families http tool person] [--steps 25] [--runs DIR]

http asks examples/reward_server.py; tool runs examples/reward_tool.py on each completion; person is the script
examples/simulated_person.py, which makes its choices on the page of `mezo judge` in Chromium. Whatever a run was tuned
by, what is shown is rewards.squad.f1 of its completions of all held-out rows. A run that is in DIR already is read, not
made again.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

import yaml
from _heading import print_heading

from mezo_lightning.commands.run_rows import columns_of_samples
from mezo_lightning.reporting.records import RunRecords, SampleRecord
from rewards.squad import f1

Fit = Callable[[Sequence[str]], None]
ROOT = Path(__file__).parents[1]
ABOUT = {
    "http": "F1, behind HTTP",
    "tool": "overlap of words, by a command for each completion",
    "person": "choices on the page, of the better F1",
}


@contextmanager
def process(*words: str, waits_for: str | None = None) -> Iterator[str]:
    """Something that runs beside a run.

    Args:
        words: What follows `python`.
        waits_for: A regular expression with a group, for its first line.

    Yields:
        What the group matched.
    """
    running = subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    try:
        found = re.search(waits_for, running.stdout.readline()) if waits_for else None
        if waits_for and not found:
            raise RuntimeError(f"{' '.join(words)} did not start")
        yield found[1] if found else ""
    finally:
        running.terminate()
        running.communicate()


@contextmanager
def http(folder: Path) -> Iterator[dict]:
    """The server, and what a run has to know of it."""
    del folder
    with process("examples/reward_server.py", "--port", "0", waits_for=r"(http://\S+)") as url:
        reward = {"class_path": "rewards.http.HTTPReward", "init_args": {"url": url, "labels": "answers"}}
        yield {"reward": reward}


@contextmanager
def tool(folder: Path) -> Iterator[dict]:
    """Nothing runs beside the run."""
    del folder
    yield {}


@contextmanager
def person(folder: Path) -> Iterator[dict]:
    """The page, and the script that makes choices on it."""
    store = str(folder.with_suffix(".sqlite").resolve())
    oracle = {"store": store, "grace_seconds": 0, "poll_seconds": 0.2}
    data = ("--data", "mezo_lightning/assets/stories/train.jsonl")
    page = ("-m", "rewards.person", "--store", store, "--port", "0")
    with (
        process(*page, waits_for=r"(http://[\w.:]+)") as url,
        process("examples/simulated_person.py", "--url", url, *data),
    ):
        yield {"oracle": {"class_path": "rewards.person.Person", "init_args": oracle}}


FAMILIES = {
    "http": (http, "reward-http.yaml"),
    "tool": (tool, "reward-tool.yaml"),
    "person": (person, "preference-person.yaml"),
}


def fit(words: Sequence[str]) -> None:
    """Run `mezo fit` in a process of its own."""
    subprocess.run([sys.executable, "-m", "mezo_lightning", "fit", *words], check=True, stdout=sys.stderr, cwd=ROOT)


def tune(name: str, folder: Path, steps: int, rows: int, more: Sequence[str], fit: Fit) -> None:
    """Make a run."""
    beside, overlay = FAMILIES[name]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with beside(folder) as settings:
        # In a file: on the command line, one setting of a reward puts the others back to their defaults.
        extra = folder.with_suffix(".yaml")
        extra.write_text(yaml.safe_dump({"model": {"objective": {"init_args": settings}}}), encoding="utf-8")
        configs = ("configs/quickstart.yaml", f"configs/{overlay}", str(extra.resolve()))
        words = [f"--config={config}" for config in configs]
        words += [f"--run_dir={folder.resolve()}", f"--trainer.max_steps={steps}", "--checkpoint.monitor=null"]
        words += [f"--trainer.val_check_interval={steps}", f"--data.num_validation={rows}", *more]
        fit([*words, f"--model.num_samples={rows}"])  # all completions are kept, to be scored below


def held_out_f1(folder: Path) -> dict[int, float]:
    """By step, the F1 of what a run wrote at its validations."""
    samples = RunRecords(folder).samples()
    answers = columns_of_samples(folder, samples)["answers"]

    def score(some: Sequence[SampleRecord]) -> float:
        return fmean(f1([sample.completion for sample in some], [answers[sample.index] for sample in some]))

    steps = sorted({sample.step for sample in samples})
    return {step: score([sample for sample in samples if sample.step == step]) for step in steps}


def main(words: Sequence[str] | None = None, fit: Fit = fit) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rows", type=int, default=200, help="held-out rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-rewards"))
    args, more = parser.parse_known_args(words)  # what is left is for `mezo fit`
    print_heading(f"The demo's model tuned by three kinds of reward, {args.rows} held-out rows")
    print("| tuned by | F1 before | after | gain | steps | minutes | asked | answers known already | masked |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)
    for name in args.families:
        folder = args.runs / name
        if not (folder / "report.html").exists():
            tune(name, folder, args.steps, args.rows, more, fit)
        values = list(held_out_f1(folder).values())
        records = RunRecords(folder)
        info, steps = records.info(), records.steps()
        assert info is not None
        asked = sum(step.calls.get("asked", 0.0) for step in steps)
        known = fmean(step.calls.get("hit_rate", 0.0) for step in steps)
        print(
            f"| {ABOUT[name]} | {values[0]:.3f} | {values[-1]:.3f} | {values[-1] - values[0]:+.3f} | {info.steps} "
            f"| {info.wall_seconds / 60:.1f} | {asked:.0f} | {known:.0%} "
            f"| {1 - fmean(step.valid_fraction for step in steps):.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
