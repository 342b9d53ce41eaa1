"""Jobs of several processes: each rank runs a function of this file and leaves what it returns in a file.

    results = run_job("name_of_function", ranks=2, folder=tmp_path, **arguments)

The processes have torchrun's environment, and none of them outlives the call. They are forks; see ``forks.py``.
"""

import functools
import os
import signal
import socket
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


@dataclass(frozen=True)
class Result:
    """What became of one rank."""

    code: int
    value: Any
    """What the function returned; None where it raised."""
    error: str
    """Everything that the process wrote."""


def run_job(function: str, ranks: int, folder: Path, **arguments: Any) -> list[Result]:
    """Run a function of this file on several ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = exit_codes(_main, ranks, folder, function, arguments)
    return [_result(folder, rank, code) for rank, code in enumerate(codes)]


def exit_codes(target: Callable[..., None], ranks: int, *arguments: Any) -> list[int]:
    """Run ``target(environment, *arguments)`` in a process for each rank; how each ended.

    Args:
        target: Has to put the environment that torchrun would have given its rank into ``os.environ``.
        ranks: How many.
        arguments: The same for all ranks.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        environment = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        processes.append(forks.server().Process(target=target, args=(environment, *arguments)))
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + forks.PATIENCE
        for process in processes:
            process.join(max(0.1, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    assert None not in codes, "the job hangs"
    return codes


def succeeded(results: list[Result]) -> list[Any]:
    """The values of all ranks, which must have ended well."""
    for rank, result in enumerate(results):
        assert result.code == 0, f"rank {rank} ended with {result.code}:\n{result.error[-4000:]}"
    return [result.value for result in results]


def _result(folder: Path, rank: int, code: int) -> Result:
    path = folder / f"rank{rank}.pt"
    value = torch.load(path, weights_only=False) if path.exists() else None
    return Result(code, value, (folder / f"rank{rank}.log").read_text(errors="replace"))


# -- what the ranks run ------------------------------------------------------------------------------------------------


def strategy_of(name: str, **arguments: Any) -> Any:
    """A strategy by a short name; "one" for a single process."""
    from mezo_lightning.strategies import ReplicatedStrategy, ZeRO3Strategy

    usual = {"timeout": 300.0} | arguments
    match name:
        case "one":
            return "auto"
        case "replicated":
            return ReplicatedStrategy(**usual)
        case _:
            return ZeRO3Strategy(gather=name, **usual)


def length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """A reward that any change of a completion changes."""
    return [len(set(text)) + len(text) / 10 for text in completions]


def fails_on_rank_one(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    if os.environ.get("RANK") == "1":
        raise LookupError("no such judge")
    return length(prompts, completions)


fails_on_rank_one.per_sample = True  # so that each rank asks about its own rows


def fit(
    *,
    strategy: str,
    model: Path,
    rows: Path,
    run: Path,
    steps: int,
    reward: str | Callable[..., Any] | None = None,
    precision: str = "32-true",
    rounding: str = "stochastic",
    batch_size: int = 4,
    pretrained: dict[str, Any] | None = None,
    strategy_arguments: dict[str, Any] | None = None,
    trainer_arguments: dict[str, Any] | None = None,
    ckpt_path: str | None = None,
    callbacks: tuple[Any, ...] = (),
    **module: Any,
) -> dict[str, Any]:
    """One fit: the steps it made, what this rank holds at the end, and what was validated."""
    from helpers import EPSILON, data_of, reward_of, trainer_of

    from mezo_lightning import CentralDifference, CrossEntropy, MeZO, MeZOModule, Pretrained
    from mezo_lightning.shards import Shard

    usual = {
        "optimizer": functools.partial(MeZO, lr=1e-3, weight_decay=0.1, rounding=rounding),
        "estimator": CentralDifference(EPSILON, num_queries=2),
    }
    objective = CrossEntropy() if reward is None else reward_of(reward)
    tuned = MeZOModule(Pretrained(str(model), **(pretrained or {})), objective, **(usual | module))
    trainer = trainer_of(
        run,
        max_steps=steps,
        strategy=strategy_of(strategy, **(strategy_arguments or {})),
        devices=int(os.environ["WORLD_SIZE"]),
        precision=precision,
        callbacks=list(callbacks),
        **({"num_sanity_val_steps": -1} | (trainer_arguments or {})),
    )
    trainer.fit(tuned, data_of(rows, batch_size=batch_size, num_validation=5), ckpt_path=ckpt_path)
    assert tuned.model is not None
    placement = tuned._placement
    named = placement.named_parameters(tuned.model)
    held = {name: (p.detach().clone().view(-1), p.begin if isinstance(p, Shard) else 0) for name, p in named}
    return {
        "held": held,
        "steps": _steps(run) if trainer.is_global_zero else None,  # who wrote them
        "digest": trainer.optimizers[0].digest,
        "validation": {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name},
        "fingerprint": placement.fingerprint(trainer.optimizers[0].space),
        "counts": tuned.parameter_counts,
    }


def _steps(run: Path) -> list[Any]:
    from mezo_lightning import Trajectory

    with Trajectory.open(run) as trajectory:
        return [(step.terms, step.decays) for step in trajectory]


def fits(*, common: dict[str, Any], cases: dict[str, dict[str, Any]], run: Path) -> dict[str, Any]:
    """Several fits one after another, by name."""
    return {name: fit(**(common | case), run=run / name) for name, case in cases.items()}


def failing_fit(**arguments: Any) -> str:
    """The error that a fit ends with."""
    try:
        fit(**arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def fit_of_different_bases(*, models: list[Path], **arguments: Any) -> str:
    """The error that a fit ends with in which every rank has a base model of its own."""
    return failing_fit(model=models[int(os.environ["RANK"])], **arguments)


def drifting_fit(*, at: int, **arguments: Any) -> str:
    """A fit in which one weight of rank one changes by itself after step ``at``."""
    return failing_fit(callbacks=(_Flip(at),), **arguments)


class _Flip(Callback):
    def __init__(self, at: int):
        self._at = at

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == self._at:
            trainer.optimizers[0].space.slices[-1].weights[0] += 1.0


def saving_fit(*, every: int, run: Path, kill: tuple[int, int] | None = None, **arguments: Any) -> dict[str, Any]:
    """A fit that saves a checkpoint every so many steps, and of which one rank may be killed at a step."""
    saving = ModelCheckpoint(run / "checkpoints", every_n_train_steps=every, save_last=True)
    callbacks = (saving, *([_Kill(*kill)] if kill else []))
    trainer_arguments = {"enable_checkpointing": True, "num_sanity_val_steps": 0, "limit_val_batches": 0}
    return fit(run=run, callbacks=callbacks, trainer_arguments=trainer_arguments, **arguments)


class _Kill(Callback):
    def __init__(self, rank: int, step: int):
        self._rank, self._step = rank, step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if (trainer.global_rank, trainer.global_step) == (self._rank, self._step):
            os.kill(os.getpid(), signal.SIGKILL)


def replayed(*, runs: dict[str, Path], strategy: str) -> dict[str, dict[str, Any]]:
    """The weights of finished runs, rebuilt from the base and the trajectory on sharded weights."""
    import torch.distributed as dist

    from mezo_lightning import Pretrained, Trajectory
    from mezo_lightning.sharding.zero3 import Sharded
    from mezo_lightning.trajectory import replay_parameters

    dist.init_process_group("gloo")
    found = {}
    for case, run in runs.items():
        placement = Sharded(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), strategy)
        with Trajectory.open(run) as trajectory:
            model = placement.load(Pretrained(**trajectory.header.base), torch.float32)
            replay_parameters(
                placement.named_weights(model), trajectory, sum_over_ranks=functools.partial(_sum, placement.ranks)
            )
        found[case] = {name: shard.detach().clone() for name, shard in placement.named_parameters(model)}
    return found


def _sum(ranks: Any, mine: int) -> int:
    return sum(ranks.gather(lambda: mine))


def _main(environment: dict[str, str], folder: Path, function: str, arguments: dict[str, Any]) -> None:
    """What a rank runs, as the process of its own that it is."""
    os.environ |= environment
    with (folder / f"rank{environment['RANK']}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    value = globals()[function](**arguments)
    torch.save(value, folder / f"rank{environment['RANK']}.pt")
