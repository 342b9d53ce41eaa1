"""The demo in other parameter spaces: held-out F1 over training, one run for each of the quickstart's overlays.

    OMP_NUM_THREADS=1 python benchmarks/parameter_spaces.py [--spaces prefix qzo] [--runs DIR] [-- OPTIONS]
    OMP_NUM_THREADS=1 python benchmarks/parameter_spaces.py --probe prefix --epsilons 0.3 1 2 4 [-- OPTIONS]

A run that is in DIR already is read, not made again; one that was stopped goes on from its last checkpoint. OPTIONS are
more words for `mezo fit`, such as `--model.optimizer.init_args.lr 0.03`: give such runs a DIR of their own.

With --probe nothing is tuned: the table has the F1 at both probes of the directions of one step from the base model,
for each epsilon, over one batch. Where the overlay has virtual tokens, another has the attention that the last token
of a prompt gives to them, a mean over the heads and the prompts of a batch, and the size of their keys and values.
"""

import argparse
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from _heading import print_heading
from torch import Tensor

from mezo_lightning import PromptDataModule
from mezo_lightning.cli import main as mezo
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.models.virtual_tokens import virtual_tokens
from mezo_lightning.reporting.records import RunRecords, StepRecord

CONFIGS = Path(__file__).parents[1] / "configs"
SPACES = ("lora", "prefix", "prompt", "4bit", "8bit", "qzo", "qzo-8bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=SPACES)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-parameter-spaces"))
    parser.add_argument("--probe", choices=SPACES, help="measure at several epsilons, and tune nothing")
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.4])
    parser.add_argument("options", nargs="*", help="more words for mezo fit, behind --")
    args = parser.parse_args()
    if args.probe:
        print_probes(args.probe, args.epsilons, args.options)
        return
    rows = []
    for space in args.spaces:
        if not (args.runs / space / "report.html").exists():
            run(space, args.runs / space, args.options)
        rows.append(row(space, RunRecords(args.runs / space)))
    print_heading("The quickstart in other parameter spaces")
    print("| overlay | numbers tuned | queries | steps seen | tied | F1 before | after | by step |")
    print("|---|--:|--:|--:|--:|--:|--:|---|")
    print("\n".join(rows))


def fit(space: str, options: list[str]) -> list[str]:
    """The words after `mezo` of a run."""
    configs = [f"--config={CONFIGS / name}.yaml" for name in ("quickstart", f"quickstart-{space}")]
    return ["fit", *configs, *options]


def run(space: str, folder: Path, options: list[str]) -> None:
    """Make a run, or what is missing of it."""
    resume = ["--ckpt_path", "last"] if (folder / "checkpoints" / "last.ckpt").exists() else []
    command = [sys.executable, "-m", "mezo_lightning", *fit(space, options), "--run_dir", str(folder), *resume]
    subprocess.run(command, check=True, stdout=sys.stderr)


def row(space: str, records: RunRecords) -> str:
    """A line of the table."""
    steps, info = records.steps(), records.info()
    assert info is not None
    curve = [(record.step, record.metrics["reward"]) for record in records.validations()]
    seen, tied = f"{info.steps} of {info.planned_steps}", fmean(step.tie_fraction for step in steps)
    return (
        f"| quickstart-{space} | {info.trainable_parameters} | {len(steps[0].projected_grads)} | {seen} | {tied:.0%} "
        f"| {curve[0][1]:.3f} | {curve[-1][1]:.3f} | {', '.join(f'{step}: {value:.3f}' for step, value in curve)} |"
    )


def print_probes(space: str, epsilons: list[float], options: list[str]) -> None:
    """The tables of --probe."""
    with redirect_stdout(StringIO()) as shown, suppress(SystemExit):
        mezo([*fit(space, options), "--print_config"])
    settings = yaml.safe_load(shown.getvalue())
    print_heading(f"Probes of quickstart-{space} around the base model, {settings['data']['batch_size']} rows")
    print("| epsilon | F1 at +z and -z, by direction | mean | tied |\n|--:|---|--:|--:|")
    for epsilon in epsilons:
        with redirect_stdout(sys.stderr):
            step = first_step(space, epsilon, options)
        values = [0 - objective for objective in step.objective.values()]  # no -0.0
        pairs = ", ".join(f"{ahead:.3f} {back:.3f}" for ahead, back in zip(values[::2], values[1::2], strict=True))
        print(f"| {epsilon:g} | {pairs} | {fmean(values):.3f} | {step.tie_fraction:.0%} |", flush=True)
    if Pretrained(**settings["model"]["pretrained"]).virtual_tokens:
        print_attention(settings)


def first_step(space: str, epsilon: float, options: list[str]) -> StepRecord:
    """What a run measures in its first step."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"--run_dir={folder}", f"--model.estimator.init_args.epsilon={epsilon}", "--trainer.max_steps=1"]
        words += ["--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
        mezo([*fit(space, options), *words])
        return RunRecords(Path(folder)).steps()[0]


@torch.inference_mode()
def print_attention(settings: dict[str, Any]) -> None:
    """How much of its attention the last token of a prompt gives to the virtual tokens, and how large those are."""
    pretrained, data = Pretrained(**settings["model"]["pretrained"]), PromptDataModule(**settings["data"])
    data.setup("fit")
    model, tokenizer = pretrained.load(), pretrained.load_tokenizer()
    tokens = virtual_tokens(model)
    assert tokens is not None
    tokens.base.set_attn_implementation("eager")  # the only one that returns what it attends to
    prompts = next(iter(data.train_dataloader())).prompts
    batch = {**tokenizer(list(prompts), return_tensors="pt", padding=True)}
    attentions = tokens.base(**tokens.in_front(batch), output_attentions=True).attentions
    print(f"\nAttention of the last token to {tokens.count} virtual token(s); root mean square of keys and values:\n")
    print("| layer | attention | keys | values |\n|--:|--:|--:|--:|")
    for layer, (attention, kept) in enumerate(zip(attentions, tokens.cache(1).layers, strict=True)):
        share = float(attention[:, :, -1, : tokens.count].sum(-1).mean())  # prompts are padded on the left
        print(f"| {layer} | {share:.4f} | {size(kept.keys):.2f} | {size(kept.values):.2f} |")


def size(tensor: Tensor) -> float:
    return float(tensor.square().mean().sqrt())


if __name__ == "__main__":
    main()
