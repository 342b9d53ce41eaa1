"""What sharding costs and saves: memory a rank, the load, a step beside two plain forwards, and the traffic.

    python benchmarks/sharded.py [--ranks 1 2] [--model opt-125m] [--shape 8x128] [--rounds 5]

Each line is a job of its own. Memory at rest: the weights that a rank holds, against the model's bytes divided by the
ranks. Load: growth of the process's anonymous memory at its peak (CPU), or the allocator's peak (CUDA). Time: one
step of one query, against two forwards of the same batch on the same sharded weights, interleaved in one process; the
best of the rounds counts. Traffic: bytes of weights that a rank receives from the others for one step, counted at
torch.distributed; and bytes of everything else, which are the values of the samples.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _heading import print_heading

KINDS = ("replicated", "layer", "whole")


class Traffic:
    """Counts what arrives through torch.distributed; DeepSpeed must not be imported before."""

    def __init__(self) -> None:
        self.weights = 0
        self.rest = 0
        for name in ("all_gather_into_tensor", "all_gather_single"):
            if name in vars(dist):
                self._wrap(name, self._count_weights)
        self._wrap("all_gather", self._count_rest)
        self._wrap("all_reduce", self._count_rest)

    def _wrap(self, name: str, count: Callable[[Any], None]) -> None:
        function = getattr(dist, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            count(next(iter((*args, *kwargs.values()))))  # the output comes first, with its name or without
            return function(*args, **kwargs)

        setattr(dist, name, counting)
        setattr(dist.distributed_c10d, name, counting)

    def _count_weights(self, output: torch.Tensor) -> None:
        self.weights += output.nbytes * (dist.get_world_size() - 1) // dist.get_world_size()

    def _count_rest(self, output: Any) -> None:
        self.rest += sum(part.nbytes for part in output) if isinstance(output, list) else output.nbytes


class PeakMemory:
    """The growth of this process's anonymous memory while in the context, in bytes; looked at every millisecond."""

    def __enter__(self) -> PeakMemory:
        self._before = self._peak = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, _anonymous())

    @property
    def growth(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
        return self._peak - self._before


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def work(args: argparse.Namespace) -> None:
    """One rank of one job: prints its figures as JSON."""
    traffic = Traffic()
    from mezo_lightning import CentralDifference, MeZO, Pretrained, Samples
    from mezo_lightning.processes.ranks import Group
    from mezo_lightning.sharding.placement import Placement, Whole
    from mezo_lightning.sharding.zero3 import Sharded

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if args.device == "cuda" else torch.device("cpu")
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    sharded = args.kind != "replicated"
    placement: Placement = Sharded(rank, ranks, device, args.kind) if sharded else Whole(Group(rank, ranks))
    if sharded:
        placement.partition([torch.nn.Parameter(torch.ones(8))])  # DeepSpeed's own start is not the model's memory
    with PeakMemory() as load:
        model: Any = placement.load(Pretrained(args.folder), torch.float32)
    if not sharded:
        model.to(device)
    named = placement.named_parameters(model)
    optimizer = MeZO(named, lr=1e-7)
    evaluator = placement.evaluator(model, optimizer.space, copies=False, min_valid_fraction=0.5)
    batch, tokens = map(int, args.shape.split("x"))
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids[placement.ranks.share(batch)].to(device)

    def measure() -> Samples:
        return Samples.of(model(input_ids=ids, labels=ids, use_cache=False).loss.float().expand(len(ids)))

    def objective() -> Samples:
        return placement.ranks.collect(measure, texts=False)

    def forwards() -> None:
        with torch.inference_mode():
            for _ in range(2):
                with placement.present(model):
                    objective()

    def step(seed: int) -> None:
        optimizer.step(estimate=CentralDifference(1e-3).estimate(evaluator(objective), seed=seed))

    best = [float("inf")] * 2
    for seed in range(args.rounds + 1):
        for place, action in enumerate((forwards, lambda seed=seed: step(seed))):
            traffic.weights = traffic.rest = 0
            placement.ranks.gather(lambda: None)
            start = time.perf_counter()
            action()
            if args.device == "cuda":
                torch.cuda.synchronize()
            if seed:  # the first round warms up
                best[place] = min(best[place], time.perf_counter() - start)
    total = sum(p.nbytes for _, p in named) if not sharded else sum(placement.ranks.gather(lambda: _bytes(named)))
    figures = {"held": _bytes(named), "model": total, "load": load.growth, "forwards": best[0], "step": best[1]}
    figures |= {"weights": traffic.weights, "rest": traffic.rest}
    Path(args.folder, f"rank{rank}.json").write_text(json.dumps(figures))


def _bytes(named: list[tuple[str, torch.Tensor]]) -> int:
    return sum(parameter.nbytes for _, parameter in named)


def run_job(args: argparse.Namespace, folder: str, kind: str, ranks: int) -> list[dict[str, float]]:
    """The figures of all ranks of a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if args.device == "cpu":  # the cores are shared out
            threads = max(1, (os.cpu_count() or 1) // ranks)
            environment |= {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
        options = {"folder": folder, "kind": kind, "shape": args.shape, "rounds": args.rounds, "device": args.device}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, __file__, *words]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    codes = [process.wait() for process in processes]  # all of them, also after a failure
    if any(codes):
        raise SystemExit(f"a job of {ranks} ranks failed ({kind})")
    return [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(ranks)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="opt-125m", help="a shape of benchmarks/step_cost.py")
    parser.add_argument("--shape", default="8x128", metavar="BATCHxTOKENS")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        work(args)
        return
    from step_cost import make_model

    print_heading(f"Sharding, {args.model} shape, fp32, batch {args.shape}", args.device)
    print(
        "| ranks | weights | held MB / floor | load peak MB | two forwards ms | step ms | ratio | gathered MB | rest |"
    )
    print("|--:|---|--:|--:|--:|--:|--:|--:|--:|")
    with tempfile.TemporaryDirectory() as folder:
        make_model(args.model, torch.float32, "cpu").save_pretrained(folder, max_shard_size="100MB")
        largest = max(file.stat().st_size for file in Path(folder).glob("*.safetensors"))
        for ranks in args.ranks:
            for kind in KINDS:
                figures = run_job(args, folder, kind, ranks)
                worst = {name: max(one[name] for one in figures) for name in figures[0]}
                floor = worst["model"] / ranks
                print(
                    f"| {ranks} | {kind} | {worst['held'] / 1e6:.0f} / {floor / 1e6:.0f} | {worst['load'] / 1e6:.0f} "
                    f"| {worst['forwards'] * 1e3:.0f} | {worst['step'] * 1e3:.0f} "
                    f"| {worst['step'] / worst['forwards']:.2f} | {worst['weights'] / 1e6:.0f} "
                    f"| {worst['rest'] / 1e3:.1f} kB |",
                    flush=True,
                )
    print(f"\nLargest file: {largest / 1e6:.0f} MB.")


if __name__ == "__main__":
    main()
