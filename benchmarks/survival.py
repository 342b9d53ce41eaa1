"""Kill a run of two processes with signal 9 again and again, resume it each time, and compare its end with another's.

    python benchmarks/survival.py [--kills 20] [--strategy ZeRO3Strategy|ReplicatedStrategy] [--seed 0]

One run is left alone. Others of the same configuration are killed at random moments, now the main process, now the
other rank, and resumed from their last checkpoint until they come to their end; then the next one starts, until enough
kills have hit. All processes have to end by themselves after each kill, and all runs have to end with the same weights,
byte for byte, and the same trajectory.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _heading import print_heading

from mezo_lightning import Trajectory

TIMEOUT = 20.0
STEPS = 60


def command(folder: Path, strategy: str) -> list[str]:
    options = {
        "config": "configs/quickstart.yaml",
        "run_dir": str(folder),
        "trainer.strategy": {"class_path": f"mezo_lightning.strategies.{strategy}", "timeout": TIMEOUT},
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.max_steps": STEPS,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "model.estimator.init_args.num_queries": 1,
        "model.objective.init_args.completer.init_args.max_new_tokens": 4,
        "data.batch_size": 4,
        "checkpoint.every_n_train_steps": 7,
        "checkpoint.monitor": "null",
    }
    strategy_options: dict = options.pop("trainer.strategy")  # pyright: ignore[reportAssignmentType]
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--trainer.strategy={strategy_options['class_path']}"]
    words += [f"--trainer.strategy.init_args.timeout={strategy_options['timeout']}"]
    return [sys.executable, "-m", "mezo_lightning", "fit", *words]


def start(folder: Path, strategy: str, log: Path) -> subprocess.Popen:
    """Start the run, or go on with it from its last checkpoint."""
    resume = ["--ckpt_path=last"] if list(folder.glob("**/last.ckpt")) else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command(folder, strategy), *resume], stdout=file, stderr=subprocess.STDOUT, env=environment
        )


def members(folder: Path) -> list[int]:
    """The processes of the run, in the order in which they were started."""
    return sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _runs(entry, folder))


def _runs(entry: Path, folder: Path) -> bool:
    try:
        return f"--run_dir={folder}".encode() in (entry / "cmdline").read_bytes()
    except OSError:  # it has just ended
        return False


def digest(folder: Path) -> dict[str, str]:
    """Hashes of the last checkpoint's weights and of the trajectory."""
    weights = sorted(path for path in folder.rglob("*.safetensors") if "last.ckpt" in str(path))
    assert weights, folder
    return {
        "weights": hashlib.sha256(b"".join(path.read_bytes() for path in weights)).hexdigest()[:16],
        "trajectory": hashlib.sha256((folder / "trajectory.bin").read_bytes()).hexdigest()[:16],
    }


def steps(folder: Path) -> int:
    """How many steps are on record."""
    if not (folder / "trajectory.bin").exists():
        return 0
    with Trajectory.open(folder) as trajectory:
        return len(trajectory)


def kill_once(folder: Path, args: argparse.Namespace, number: int, generator: random.Random) -> str | None:
    """Start or resume, kill one process at a random moment, and wait for the others to end; None if the run ended."""
    process = start(folder, args.strategy, folder.with_suffix(".log"))
    # A start takes this long, give or take; most kills are to hit steps and checkpoints.
    end = time.monotonic() + generator.uniform(0.6, 1.6) * args.start_seconds
    while time.monotonic() < end or len(members(folder)) < 2:
        if process.poll() is not None:
            if process.returncode:
                raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
            return None
        time.sleep(0.05)
    running = members(folder)
    victim = running[number % 2]
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    process.wait(TIMEOUT + 60)
    while members(folder):
        if time.monotonic() - killed > TIMEOUT + 60:
            raise SystemExit(f"processes are left after kill {number}: {members(folder)}")
        time.sleep(0.1)
    who = "main process" if victim == running[0] else "rank 1"
    return f"{who} killed, all gone after {time.monotonic() - killed:.1f} s, {steps(folder)} steps on record"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--strategy", default="ZeRO3Strategy", choices=("ZeRO3Strategy", "ReplicatedStrategy"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = random.Random(args.seed)
    print_heading(f"Survival of kill -9, {args.strategy}, 2 processes")
    with tempfile.TemporaryDirectory() as scratch:
        calm = Path(scratch, "calm")
        began = time.monotonic()
        if start(calm, args.strategy, calm.with_suffix(".log")).wait():
            raise SystemExit(calm.with_suffix(".log").read_text()[-3000:])
        seconds = time.monotonic() - began
        args.start_seconds = seconds / 2
        expected = digest(calm)
        print(f"Undisturbed: {STEPS} steps in {seconds:.0f} s, start included: {expected}\n", flush=True)
        kills = runs = 0
        while True:
            folder = Path(scratch, f"killed{runs}")
            outcome = kill_once(folder, args, kills, generator) if kills < args.kills else None
            if outcome is not None:
                kills += 1
                print(f"{kills}. run {runs + 1}: {outcome}", flush=True)
                if not list(folder.glob("**/last.ckpt")):  # it had come to no checkpoint: nothing to resume
                    shutil.rmtree(folder, ignore_errors=True)
                continue
            if kills == args.kills and start(folder, args.strategy, folder.with_suffix(".log")).wait():
                raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
            found = digest(folder)
            runs += 1
            print(f"\nRun {runs} came to its end: {found}\n", flush=True)
            if found != expected:
                sys.exit("**DIFFERENT** from the undisturbed run")
            if kills == args.kills:
                break
        print(f"**{kills} kills, {runs} runs, all equal to the undisturbed one.**")


if __name__ == "__main__":
    main()
