"""What an update of 16-bit weights keeps of what was asked for, and the noise that rounding adds.

A million weights of standard deviation 0.02; steps along random directions with an update RMS of 1e-6 each. Printed
for each dtype and way of rounding, of the stored value (what ``compensated`` and ``master`` keep beside the weights
included):

gain    movement along the intended direction, divided by what was asked for; 1 is right
noise   RMS of (movement - intended movement) after all steps, in units of one step's intended RMS, and as a share of
        the weights' standard deviation

Run: python benchmarks/rounding.py > benchmarks/results/rounding.md
"""

import argparse
from dataclasses import dataclass

import torch
from _heading import print_heading
from torch import Tensor, nn

from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.rounding import RoundingName
from mezo_lightning.samplers import Gaussian, derive_seed
from mezo_lightning.steps import Step, round_coefficient

STD = 0.02


@dataclass(frozen=True)
class Figures:
    """What was measured for one dtype and way of rounding."""

    gain: float
    noise: float
    relative: float


def stored_values(space: ParameterSpace) -> Tensor:
    """What the weights of the only slice stand for, fp64."""
    [piece] = space.slices
    values = torch.empty(len(piece))
    space.stores[0].read(piece.weights, 0, values)
    return values.double()


def start(count: int, dtype: torch.dtype) -> nn.Parameter:
    """The weights before any step."""
    return nn.Parameter((torch.randn(count, generator=torch.Generator().manual_seed(0)) * STD).to(dtype))


def measure(dtype: torch.dtype, rounding: RoundingName, *, count: int, steps: int, rms: float) -> Figures:
    """Apply steps through the library."""
    parameter, size = start(count, dtype), round_coefficient(rms)
    space = ParameterSpace.of([("w", parameter)], [0], Gaussian(), rounding)
    before, intended = stored_values(space), torch.zeros(count, dtype=torch.float64)
    for step in range(steps):
        seed = derive_seed(1, step)
        space.apply([Step(((seed, (size,)),), (0.0,), step)])
        intended += size * Gaussian().fill(torch.empty(count), seed, 0)
    return compare(stored_values(space) - before, intended, rms)


def measure_nearest(dtype: torch.dtype, *, count: int, steps: int, rms: float) -> Figures:
    """The same by rounding to nearest, as published code does."""
    weights, size = start(count, dtype).data, round_coefficient(rms)
    before, intended = weights.double(), torch.zeros(count, dtype=torch.float64)
    for step in range(steps):
        update = size * Gaussian().fill(torch.empty(count), derive_seed(1, step), 0)
        weights = (weights.float() + update).to(dtype)
        intended += update
    return compare(weights.double() - before, intended, rms)


def compare(moved: Tensor, intended: Tensor, rms: float) -> Figures:
    """Gain and noise of a movement."""
    noise = float((moved - intended).square().mean().sqrt())
    return Figures(float(moved @ intended / (intended @ intended)), noise / rms, noise / STD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=1 << 20, help="weights")
    parser.add_argument("--steps", type=int, default=50, help="updates")
    parser.add_argument("--rms", type=float, default=1e-6, help="RMS of one update")
    options = parser.parse_args()
    size = {"count": options.count, "steps": options.steps, "rms": options.rms}
    print_heading("Updates of 16-bit weights")
    print(f"{options.count:,} weights of std {STD}, {options.steps} steps of RMS {options.rms:g}.")
    print("Gain: movement along the intended direction, as a share of it. Noise: RMS of what rounding added over all")
    print("steps, against the intended RMS of one step, and against the weights' std. On the stored value.\n")
    print("| dtype | rounding | bytes per weight | gain | noise / step | noise / std |\n|---|---|---|---|---|---|")
    ways: list[tuple[RoundingName, int]] = [("stochastic", 2), ("compensated", 3), ("master", 6)]
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        rows = [("to nearest (not offered)", 2, measure_nearest(dtype, **size))]
        rows += [(rounding, cost, measure(dtype, rounding, **size)) for rounding, cost in ways]
        for rounding, cost, f in rows:
            print(f"| {name} | {rounding} | {cost} | {f.gain:.4f} | {f.noise:.3g} | {f.relative:.2e} |")


if __name__ == "__main__":
    main()
