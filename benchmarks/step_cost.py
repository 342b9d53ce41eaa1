"""What one MeZO step costs beside two plain forwards, and how much memory it takes.

    python benchmarks/step_cost.py [--shapes 8x128 4x64] [--rounds 7] [--model opt-125m] [--new-tokens 0]
    python benchmarks/step_cost.py --only-memory

Time: two plain forwards, our step with each evaluator, and a plain-torch copy of the published step (four passes of
``torch.normal`` and out-of-place additions), on the same model and batch, interleaved in one process; the best of the
rounds counts, and ratios to the two forwards are what to read. "Leaf scratch" is as a run on one device has it, both
probes of a pair in lockstep; "a probe at a time" is without. With ``--new-tokens`` a forward is a greedy completion of
so many tokens, the work of a reward objective. Memory: each in a process of its own, peak resident (CPU) or allocated
(CUDA) bytes. The weights are random: neither time nor memory depends on them.
"""

import argparse
import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _heading import print_heading
from torch import Tensor
from transformers import GenerationConfig, OPTConfig, OPTForCausalLM, PreTrainedModel

from mezo_lightning import CentralDifference, Copy, Gaussian, LeafScratch, MeZO
from mezo_lightning.evaluators import Evaluator

EPSILON, LR = 1e-3, 1e-7
MODELS = {
    "opt-tiny": {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 256, "num_hidden_layers": 2,
                 "num_attention_heads": 4},
    "opt-125m": {},
    "opt-1.3b": {"hidden_size": 2048, "word_embed_proj_dim": 2048, "ffn_dim": 8192, "num_hidden_layers": 24,
                 "num_attention_heads": 32},
}  # fmt: skip
KINDS = ("two forwards", "ours, leaf scratch", "ours, a probe at a time", "ours, copy", "published step")
GENERATION_KINDS = ("two forwards", "ours, copy", "published step")  # leaf scratch would perturb once a token


def make_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """An OPT of that shape with random weights."""
    torch.manual_seed(0)
    return OPTForCausalLM(OPTConfig(**MODELS[name])).to(device, dtype).eval()


def make_loss(model: PreTrainedModel, batch: int, tokens: int) -> Callable[[], Tensor]:
    """A language-model loss over the whole batch, logits and all: the plain forward of this benchmark."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss.float()

    return loss


def make_completions(model: PreTrainedModel, batch: int, tokens: int, new_tokens: int) -> Callable[[], Tensor]:
    """Greedy completions of the whole batch; the number that is made of them does not matter here."""
    ids = torch.randint(5, model.config.vocab_size, (batch, tokens), generator=torch.Generator().manual_seed(1))
    ids = ids.to(model.device)
    settings = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=1)

    def complete() -> Tensor:
        completed: Any = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        return completed[:, tokens:].float().mean() / model.config.vocab_size

    return complete


def make_work(args: argparse.Namespace, model: PreTrainedModel, batch: int, tokens: int) -> Callable[[], Tensor]:
    if args.new_tokens:
        return make_completions(model, batch, tokens, args.new_tokens)
    return make_loss(model, batch, tokens)


def kinds(args: argparse.Namespace) -> tuple[str, ...]:
    return GENERATION_KINDS if args.new_tokens else KINDS


def published_step(model: PreTrainedModel, loss: Callable[[], Tensor], seed: int) -> None:
    """The published step: perturb, forward, perturb, forward, restore, update, with z drawn each time anew."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def move(scale: float) -> None:
        torch.manual_seed(seed)
        for p in parameters:
            z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)
            p.data = p.data + scale * z * EPSILON

    move(1)
    plus = loss()
    move(-2)
    minus = loss()
    projected_grad = ((plus - minus) / (2 * EPSILON)).item()
    move(1)
    torch.manual_seed(seed)
    for p in parameters:
        z = torch.normal(mean=0, std=1, size=p.data.size(), device=p.device, dtype=p.dtype)
        p.data = p.data - LR * (projected_grad * z)


def make_steps(model: PreTrainedModel, loss: Callable[[], Tensor]) -> dict[str, Callable[[int], None]]:
    """The things to compare, each a function of a seed."""
    evaluators: dict[str, tuple[MeZO, Evaluator]] = {}

    def ours(kind: str, seed: int) -> None:
        if kind not in evaluators:  # made when first used, so that a memory run holds only what it needs
            optimizer = MeZO(model.named_parameters(), lr=LR, sampler=Gaussian())
            space, lockstep = optimizer.space, kind == "leaf scratch"
            made = Copy(space) if kind == "copy" else LeafScratch(model, space, lockstep=lockstep)
            evaluators[kind] = (optimizer, made)
        optimizer, evaluator = evaluators[kind]
        optimizer.step(estimate=CentralDifference(EPSILON).estimate(evaluator(loss), seed=seed))

    def forwards(seed: int) -> None:
        del seed
        loss()
        loss()

    steps = (
        forwards,
        lambda seed: ours("leaf scratch", seed),
        lambda seed: ours("a probe at a time", seed),
        lambda seed: ours("copy", seed),
        lambda seed: published_step(model, loss, seed),
    )
    return dict(zip(KINDS, steps, strict=True))


@torch.inference_mode(False)
@torch.no_grad()
def measure_times(args: argparse.Namespace, batch: int, tokens: int) -> dict[str, float]:
    """Best seconds of each kind, interleaved."""
    model = make_model(args.model, args.dtype, args.device)
    steps = make_steps(model, make_work(args, model, batch, tokens))
    best = dict.fromkeys(kinds(args), float("inf"))
    for seed in range(args.rounds + 1):
        for kind in best:
            step = steps[kind]
            gc.collect()
            synchronise(args.device)
            start = time.perf_counter()
            step(seed)
            synchronise(args.device)
            if seed:  # the first round warms up
                best[kind] = min(best[kind], time.perf_counter() - start)
    return best


@torch.no_grad()
def print_peak_memory(args: argparse.Namespace, batch: int, tokens: int) -> None:
    """In a process of its own: run one kind a few times and print the peak in bytes."""
    model = make_model(args.model, args.dtype, args.device)
    step = make_steps(model, make_work(args, model, batch, tokens))[args.memory_of]
    for seed in range(3):
        step(seed)
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        # Not getrusage: its peak begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        print(next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")))


def measure_memory(args: argparse.Namespace, shape: str) -> dict[str, float]:
    """Peak bytes of each kind, each in a fresh process."""
    peaks = {}
    for kind in ("one forward", *kinds(args)[1:]):
        options = {"model": args.model, "dtype": str(args.dtype).removeprefix("torch."), "device": args.device}
        options |= {"shapes": shape, "memory-of": KINDS[0] if kind == "one forward" else kind}
        options |= {"new-tokens": str(args.new_tokens)}
        command = [
            sys.executable,
            __file__,
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]
        peaks[kind] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    return peaks


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="opt-125m")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "4x64"], metavar="BATCHxTOKENS")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=0, help="complete so many tokens instead of one forward")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only-memory", action="store_true", help="take no times: a busy machine would distort them")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    shapes = {shape: tuple(map(int, shape.split("x"))) for shape in args.shapes}
    if args.memory_of:
        print_peak_memory(args, *shapes[args.shapes[0]])
        return
    print_heading(f"Cost of one step, {args.model} shape, {str(args.dtype).removeprefix('torch.')}", args.device)
    for shape, (batch, tokens) in shapes.items():
        times = {} if args.only_memory else measure_times(args, batch, tokens)
        completed = f", {args.new_tokens} tokens completed" if args.new_tokens else ""
        print(f"## batch {batch} x {tokens} tokens{completed}\n")
        print_table(times, measure_memory(args, shape))


def print_table(times: dict[str, float], peaks: dict[str, float]) -> None:
    """A line for each kind: its time beside two forwards, and its memory beside one."""
    forward = peaks.pop("one forward")
    print("| | " + ("ms | times two forwards | " if times else "") + "peak MB | times one forward |")
    print("|---|--:|--:|" + ("--:|--:|" if times else ""))
    for kind, peak in ({KINDS[0]: forward} | peaks).items():
        line = f"| {times[kind] * 1e3:.0f} | {times[kind] / times[KINDS[0]]:.2f} " if times else ""
        print(f"| {kind} {line}| {peak / 2**20:.0f} | {peak / forward:.2f} |")
    print()


if __name__ == "__main__":
    main()
