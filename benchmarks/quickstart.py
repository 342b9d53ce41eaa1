"""The demo on several seeds: held-out F1 before and after, and how long it took.

    python benchmarks/quickstart.py [--seeds 0 1 2] [--runs DIR]

A run that is in DIR already is read, not made again.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from _heading import print_heading

from mezo_lightning.reporting.records import RunRecords

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-quickstart"))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        folder = args.runs / f"seed{seed}"
        if not (folder / "report.html").exists():
            command = [sys.executable, "-m", "mezo_lightning", "fit", "--config", str(CONFIG), "--run_dir", str(folder)]
            subprocess.run([*command, "--seed_everything", str(seed)], check=True, stdout=sys.stderr)
        records = RunRecords(folder)
        curve = [(record.step, record.metrics["reward"]) for record in records.validations()]
        info = records.info()
        assert info is not None
        rows.append((seed, curve, info))
    print_heading("The demo on several seeds")
    print("| seed | F1 before | after | gain | best | steps | minutes | peak MB | held-out F1 over training |")
    print("|--:|--:|--:|--:|--:|--:|--:|--:|---|")
    for seed, curve, info in rows:
        values = [value for _, value in curve]
        print(
            f"| {seed} | {values[0]:.3f} | {values[-1]:.3f} | {values[-1] - values[0]:+.3f} | {max(values):.3f} "
            f"| {info.steps} | {info.wall_seconds / 60:.1f} | {info.peak_memory_bytes / 2**20:.0f} "
            f"| {', '.join(f'{step}: {value:.2f}' for step, value in curve)} |"
        )


if __name__ == "__main__":
    main()
