"""The demo in other parameter spaces: held-out F1 over training, one run for each of the quickstart's overlays.

    OMP_NUM_THREADS=1 python benchmarks/parameter_spaces.py [--spaces prefix qzo] [--runs DIR]

A run that is in DIR already is read, not made again; one that was stopped goes on from its last checkpoint.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from _heading import print_heading

from mezo_lightning.reporting.records import RunRecords

CONFIGS = Path(__file__).parents[1] / "configs"
SPACES = ("lora", "prefix", "prompt", "4bit", "8bit", "qzo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-parameter-spaces"))
    args = parser.parse_args()
    rows = []
    for space in args.spaces:
        if not (args.runs / space / "report.html").exists():
            run(space, args.runs / space)
        rows.append(row(space, RunRecords(args.runs / space)))
    print_heading("The quickstart in other parameter spaces")
    print("| overlay | numbers tuned | queries | steps seen | tied | F1 before | after | by step |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    print("\n".join(rows))


def run(space: str, folder: Path) -> None:
    """Make a run, or what is missing of it."""
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("quickstart", f"quickstart-{space}")]
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    command = [sys.executable, "-m", "mezo_lightning", "fit", *configs, "--run_dir", str(folder), *resume]
    subprocess.run(command, check=True, stdout=sys.stderr)


def row(space: str, records: RunRecords) -> str:
    """A line of the table."""
    steps, info = records.steps(), records.info()
    assert info is not None
    curve = [(record.step, record.metrics["reward"]) for record in records.validations()]
    seen, tied = f"{info.steps} of {info.planned_steps}", sum(step.tie_fraction for step in steps) / len(steps)
    return (
        f"| quickstart-{space} | {info.trainable_parameters} | {len(steps[0].projected_grads)} | {seen} | {tied:.0%} "
        f"| {curve[0][1]:.3f} | {curve[-1][1]:.3f} | {', '.join(f'{step}: {value:.3f}' for step, value in curve)} |"
    )


if __name__ == "__main__":
    main()
