"""Whatever happens to one process of a job that Lightning starts, all of them end, and those that are left say why."""

import os
import re
import signal
from pathlib import Path

import forks
import pytest
from helpers import write_config

from mezo_lightning.reporting.records import RunRecords

pytestmark = pytest.mark.slow

KILLER = """
import os, signal
from mezo_lightning import CentralDifference

calls = 0
original = CentralDifference.estimate

def estimate(self, evaluate, *, seed):
    global calls
    calls += 1
    if calls == 2 and os.environ["LOCAL_RANK"] == os.environ["KILLED"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, evaluate, seed=seed)

CentralDifference.estimate = estimate

def reward(prompts, completions, **columns):
    return [len(set(text)) + len(text) / 10 for text in completions]
"""
SCRIPT = """
import os, sys
if os.environ.get("LOCAL_RANK", "0") == "1" and sys.argv[3] == "absent":
    sys.exit(3)
import torch
from pathlib import Path
from helpers import data_of, module_of, trainer_of
from lightning.pytorch import Callback
from mezo_lightning.processes.launching import Launcher
from mezo_lightning.strategies import ZeRO3Strategy

if sys.argv[3] == "orphan":
    start = Launcher._call_children_scripts

    def start_and_die(self):
        start(self)
        os.kill(os.getpid(), 9)

    Launcher._call_children_scripts = start_and_die

class Fails(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_rank == 1 and trainer.global_step == 2:
            module.model.model.decoder.layers[1].register_forward_pre_hook(self.fail)

    def fail(self, *_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

torch.set_num_threads(1)
strategy = ZeRO3Strategy(gather="layer")
trainer = trainer_of(Path("run"), 4, strategy=strategy, devices=2, callbacks=[Fails()])
trainer.fit(module_of(sys.argv[1]), data_of(Path(sys.argv[2])))
"""


def run_and_read(*words: object, folder: Path, **variables: str) -> tuple[int, str]:
    """The exit code of a command, and its stderr to the end: until all processes that it started have ended too."""
    path = os.pathsep.join([str(folder), str(Path(__file__).parent)])
    log = folder / "stderr"
    os.mkfifo(log)
    with forks.cleared() as processes:
        environment = {"PYTHONPATH": path, **variables}
        processes.append(forks.start(forks.python, *map(str, words), folder=folder, log=log, environment=environment))
        text = log.read_text()
        return forks.ended(processes[0]), text


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_a_run(killed: int, tmp_path: Path, opt: Path, rows: Path):
    (tmp_path / "killer.py").write_text(KILLER)
    completer = {"class_path": "Generate", "init_args": {"max_new_tokens": 6}}
    objective = {"reward": "killer.reward", "completer": completer}
    config = write_config(
        tmp_path / "config.yaml", opt, rows, {"class_path": "RewardObjective", "init_args": objective}
    )
    words = ["-m", "mezo_lightning", "fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.devices", "2"]
    strategy = ["--trainer.strategy", "ReplicatedStrategy", "--trainer.strategy.timeout", "300"]
    code, log = run_and_read(*words, *strategy, folder=tmp_path, KILLED=str(killed))
    if killed == 1:
        assert code == 1
        assert re.search(r"^mezo: error: rank 1 of 2 \(process \d+\) was killed by signal 9", log, re.M), log
        info = RunRecords(tmp_path / "run").info()
        assert info is not None
        assert info.status == "failed"
        assert "was killed by signal 9" in info.notes[0]
    else:
        assert code == -signal.SIGKILL
        assert "\nmezo: error: rank 0 of 2 has ended without a word: its connection is closed\n" in log


def test_an_error_within_a_forward_that_gathers_weights_ends_a_run(tmp_path: Path, opt: Path, rows: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, log = run_and_read("script.py", opt, rows, "present", folder=tmp_path)
    assert code == 1
    assert "[rank1]: torch.OutOfMemoryError: tried to allocate 20 GiB\n" in log
    cause = "rank 1 of 2 failed: OutOfMemoryError: tried to allocate 20 GiB"
    assert (
        f"[rank0]: mezo_lightning.processes.ranks.RankError: {cause}\n" in log
        or f"mezo: rank 0 of 2 is ended by its watchdog: {cause} (" in log
    )


def test_a_process_that_never_joins_ends_a_run(tmp_path: Path, opt: Path, rows: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, log = run_and_read("script.py", opt, rows, "absent", folder=tmp_path)
    assert code == 1
    assert re.search(r"^mezo: rank 1 of 2 \(process \d+\) ended with exit code 3 before the job had begun$", log, re.M)


def test_a_process_whose_starter_is_gone_ends(tmp_path: Path, opt: Path, rows: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    code, log = run_and_read("script.py", opt, rows, "orphan", folder=tmp_path)
    assert code == -signal.SIGKILL
    assert "mezo: the process that started this one is gone before the job had begun\n" in log
