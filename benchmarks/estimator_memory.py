"""How much memory the estimators take beyond MeZO's.

    python benchmarks/estimator_memory.py [--model opt-125m] [--shape 4x64] [--evaluators leaf-scratch copy]

Each estimator runs in a process of its own, a few times over; the smallest peak counts, because an allocator's luck
only ever adds. A peak is the growth of the process's anonymous memory over its weights (CPU), or what was allocated at
most (CUDA), while the evaluator is made and two steps are taken; the weights are random. A guiding vector that was kept
as a tensor would take as much again as the weights: 100 %.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable

import torch
from _heading import print_heading
from sharded import PeakMemory
from step_cost import EPSILON, LR, MODELS, make_loss, make_model, synchronise
from torch import Tensor
from transformers import PreTrainedModel

from mezo_lightning import CentralDifference, Copy, GreedyDirection, GuidingVector, LeafScratch, MeZO, Population
from mezo_lightning.estimators import Estimator

ESTIMATORS: dict[str, Estimator] = {
    "CentralDifference": CentralDifference(EPSILON),
    "GuidingVector, pool_size 8": GuidingVector(EPSILON, 8),
    "GreedyDirection, pool_size 8": GreedyDirection(EPSILON, 8),
    "Population, population_size 8": Population(EPSILON, 8),
}
EVALUATORS = ("leaf-scratch", "copy")


def take_steps(model: PreTrainedModel, loss: Callable[[], Tensor], estimator: Estimator, kind: str) -> None:
    optimizer = MeZO(model.named_parameters(), lr=LR)
    evaluator = Copy(optimizer.space) if kind == "copy" else LeafScratch(model, optimizer.space)
    for seed in range(2):
        optimizer.step(estimate=estimator.estimate(evaluator(loss), seed=seed))


def print_peak(args: argparse.Namespace) -> None:
    """In a process of its own: run one estimator and print the bytes of the weights and of the peak."""
    model = make_model(args.model, args.dtype, args.device)
    loss = make_loss(model, *map(int, args.shape.split("x")))
    with torch.inference_mode():
        loss()  # what a first forward leaves behind is not the estimator's
    with PeakMemory() as memory:
        take_steps(model, loss, ESTIMATORS[args.peak_of], args.evaluators[0])
        synchronise(args.device)
    print(sum(p.numel() * p.element_size() for p in model.parameters()), memory.growth)


def measure(args: argparse.Namespace, estimator: str, evaluator: str) -> tuple[int, int]:
    """Bytes of the weights, and of the smallest peak of several processes."""
    options = {"model": args.model, "dtype": str(args.dtype).removeprefix("torch."), "device": args.device}
    options |= {"shape": args.shape, "evaluators": evaluator, "peak-of": estimator}
    command = [sys.executable, __file__, *(word for name, value in options.items() for word in (f"--{name}", value))]
    peaks = []
    for _ in range(args.repeats):
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        weights, peak = map(int, output.split()[-2:])
        peaks.append(peak)
    return weights, min(peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="opt-125m")
    parser.add_argument("--shape", default="4x64", metavar="BATCHxTOKENS")
    parser.add_argument("--evaluators", nargs="+", choices=EVALUATORS, default=EVALUATORS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peak-of", choices=ESTIMATORS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        print_peak(args)
        return
    dtype = str(args.dtype).removeprefix("torch.")
    print_heading(f"Memory of the estimators, {args.model} shape, {dtype}, {args.shape}", args.device)
    for evaluator in args.evaluators:
        print(f"## {evaluator}\n\n| | peak MB | more than MeZO, MB | of the weights |\n|---|--:|--:|--:|")
        plain = None
        for name in ESTIMATORS:
            weights, peak = measure(args, name, evaluator)
            plain = peak if plain is None else plain
            extra = peak - plain
            print(f"| {name} | {peak / 2**20:.0f} | {extra / 2**20:+.1f} | {extra / weights:+.2%} |", flush=True)
        print(f"\nThe weights: {weights / 2**20:.0f} MB.\n")


if __name__ == "__main__":
    main()
