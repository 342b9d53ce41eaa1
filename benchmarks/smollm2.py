"""SmolLM2-135M-Instruct on SST-2: by the loss over two options, and by accuracy as the reward.

    python benchmarks/smollm2.py --data DIR [--runs DIR]

DIR has SST-2's train.tsv and dev.tsv. Needs `make smollm2`. A run that is in the folder of runs already is read, not
made again.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean

from _heading import print_heading

from mezo_lightning.reporting.records import RunRecords

CONFIGS = Path(__file__).parents[1] / "configs"
OVERLAYS = {"loss": (), "accuracy as the reward": ("smollm2-135m-sst2-accuracy.yaml",)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-smollm2"))
    args = parser.parse_args()
    print_heading("SmolLM2-135M-Instruct on SST-2, prompt `{sentence} It was`, 400 held-out rows")
    print("| objective | accuracy before | after | best | steps | minutes | peak MB | pairs that tied | by step |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for name, overlays in OVERLAYS.items():
        folder = args.runs / name.replace(" ", "-")
        if not (folder / "report.html").exists():
            configs = [CONFIGS / file for file in ("smollm2-135m-sst2.yaml", *overlays)]
            command = [sys.executable, "-m", "mezo_lightning", "fit", "--run_dir", str(folder)]
            command += [word for config in configs for word in ("--config", str(config))]
            command += ["--data.train", str(args.data / "train.tsv"), "--data.validation", str(args.data / "dev.tsv")]
            subprocess.run(command, check=True, stdout=sys.stderr)
        records = RunRecords(folder)
        metric = "reward" if overlays else "accuracy"
        curve = [(record.step, record.metrics[metric]) for record in records.validations()]
        info = records.info()
        assert info is not None
        values = [value for _, value in curve]
        ties = fmean(record.tie_fraction for record in records.steps())
        print(
            f"| {name} | {values[0]:.3f} | {values[-1]:.3f} | {max(values):.3f} | {info.steps} "
            f"| {info.wall_seconds / 60:.1f} | {info.peak_memory_bytes / 2**20:.0f} | {ties:.0%} "
            f"| {', '.join(f'{step}: {value:.3f}' for step, value in curve)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
