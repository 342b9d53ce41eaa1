"""Directions, rounding and updates have the same bits on a GPU as on the CPU."""

import itertools
import random

import pytest
import torch
from gpu_helpers import DEVICE, DTYPES, KINDS, NEEDS_CUDA, ROUNDINGS, assert_same_states, same
from torch import Tensor, nn

from mezo_lightning import samplers
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.rounding import RoundingName, fill_rounding_lanes, make_store
from mezo_lightning.samplers import Gaussian, LaneSampler, Rademacher, chunk_numel, fill_lanes, mix64
from mezo_lightning.steps import Point, Step, round_coefficient, round_fp32

pytestmark = NEEDS_CUDA

CPU = torch.device("cpu")
SAMPLERS = [Gaussian(), Rademacher()]
SEEDS = [0, 1, (1 << 63) + 5, (1 << 64) - 1]
STARTS = [0, 1, 2, 3, 4, 5, 1021, (1 << 22) - 3, (1 << 31) - 2, (1 << 32) + 1, (1 << 53) + 3, (1 << 62) + 7]


def z(sampler: LaneSampler, device: torch.device, seed: int, start: int, count: int) -> Tensor:
    return sampler.fill(torch.empty(count, device=device), seed, start)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("start", STARTS)
def test_directions_at_any_position(sampler: LaneSampler, start: int):
    for seed, count in itertools.product(SEEDS, (1, 2, 3, 4, 5, 4099)):
        assert same(z(sampler, DEVICE, seed, start, count), z(sampler, CPU, seed, start, count)), (seed, count)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_directions_of_several_chunks_in_any_cuts(sampler: LaneSampler):
    count = chunk_numel(DEVICE) + 4103
    whole = z(sampler, CPU, 7, 5, count)
    assert same(z(sampler, DEVICE, 7, 5, count), whole)
    order = random.Random(0)
    edges = sorted({0, count, chunk_numel(DEVICE) - 1, *(order.randrange(count) for _ in range(20))})
    parts = list(itertools.pairwise(edges))
    order.shuffle(parts)
    pieced = torch.full((count,), torch.nan, device=DEVICE)
    for begin, end in parts:
        sampler.fill(pieced[begin:end], 7, 5 + begin)
    assert same(pieced, whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("chunk", [4, 64, 1000, 4097])
def test_directions_with_any_chunk(sampler: LaneSampler, chunk: int, monkeypatch: pytest.MonkeyPatch):
    whole = z(sampler, CPU, 7, 3, 10_001)
    monkeypatch.setattr(samplers, "chunk_numel", lambda device: chunk)
    monkeypatch.setattr(samplers, "_workspaces", samplers._Workspaces())
    assert same(z(sampler, DEVICE, 7, 3, 10_001), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("width", [1, 3, 64, 70])
def test_rows_of_directions(sampler: LaneSampler, width: int):
    starts = torch.tensor(STARTS)
    assert same(sampler.rows(11, starts.to(DEVICE), width), sampler.rows(11, starts, width))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compiled_directions_and_sums(sampler: LaneSampler):
    """One fused kernel from counters to the sum, in which a GPU's compiler makes one FMA of product and sum."""
    count, start, seed = 1 << 20, 6, 21
    coefficient = round_coefficient(1e-3)
    key, increment = (samplers._signed(value) for value in samplers._stream(seed))
    table = samplers._quantiles(DEVICE)

    def fused(weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        words = mix64((positions // 4) * increment + key)
        lanes = (words >> (16 * (positions % 4))) & 0xFFFF
        direction = table[lanes] if isinstance(sampler, Gaussian) else 1.0 - 2.0 * (lanes >= 1 << 15)
        return direction, weights + coefficient * direction

    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    positions = torch.arange(start, start + count, device=DEVICE)
    direction, moved = torch.compile(fused)(weights.to(DEVICE), positions)
    expected = z(sampler, CPU, seed, start, count)
    assert same(direction, expected)
    assert same(moved, weights.add(expected, alpha=coefficient))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_own_code_compiled(sampler: LaneSampler):
    expected = z(sampler, CPU, 33, 0, 10_000)
    samplers._stream(33)
    samplers._quantiles(DEVICE)
    lanes = fill_lanes(torch.empty(10_000, dtype=torch.int32, device=DEVICE), 33, 0)
    compiled = torch.compile(lambda lanes, out: sampler.from_lanes(lanes, out))
    assert same(compiled(lanes, torch.empty(10_000, device=DEVICE)), expected)
    rows = torch.compile(lambda starts: sampler.rows(33, starts, 50))(torch.arange(0, 10_000, 50, device=DEVICE))
    assert same(rows.view(-1), expected)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("coefficient", [1e-3, -1e-7, 3.3e-1, -2.5e-30, 7.7e20])
def test_a_weight_plus_a_product_is_one_rounding_of_the_exact_sum(sampler: LaneSampler, coefficient: float):
    coefficient = round_coefficient(coefficient)
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02
    direction = z(sampler, DEVICE, 9, 1, 1 << 20)
    exact = (weights.double() + coefficient * direction.cpu().double()).float()
    here = weights.to(DEVICE)
    assert same(here + coefficient * direction, exact)
    assert same(here.add_(direction, alpha=coefficient), exact)


# -- rounding ----------------------------------------------------------------------------------------------------------


def all_finite(dtype: torch.dtype) -> Tensor:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return patterns[patterns.isfinite()]


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
def test_stores_read_and_write_the_same_bits(dtype: torch.dtype, rounding: RoundingName):
    """Numbers of every kind, moved by much, by little and not at all, several times in a row."""
    generator = torch.Generator().manual_seed(0)
    start = all_finite(torch.bfloat16).float() if dtype == torch.float32 else all_finite(dtype)
    start = torch.cat([start, (torch.randn(100_000, generator=generator) * 0.02).to(dtype)])
    count = start.numel()
    devices = (CPU, DEVICE)
    weights = [start.clone().to(device) for device in devices]
    stores = [make_store(tensor, rounding) for tensor in weights]
    for number in range(4):
        relative = torch.randn(count, generator=generator) * 10.0 ** -torch.arange(1, 9)[torch.arange(count) % 8]
        relative[torch.arange(count) % 11 == 0] = 0.0
        found = [torch.empty(count, device=device) for device in devices]
        for store, tensor, values in zip(stores, weights, found, strict=True):
            store.read(tensor, 0, values)
        assert same(*found)
        moved = (found[0] * (1 + relative)).clamp_(-3e38, 3e38)
        lanes = torch.randint(0, 1 << 16, (count,), generator=generator, dtype=torch.int32)
        for store, tensor in zip(stores, weights, strict=True):
            store.write(tensor, 0, moved.to(tensor.device), lanes.to(tensor.device))
        assert same(*weights), number
        assert_same_states(*stores)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_lanes(rounding: RoundingName):
    for number, start in itertools.product((0, 1, 2, 7, 100_000), STARTS):
        lanes = [torch.empty(999, dtype=torch.int32, device=device) for device in (CPU, DEVICE)]
        for out in lanes:
            fill_rounding_lanes(out, rounding, number, start)
        assert same(*lanes), (number, start)


# -- the parameter space -----------------------------------------------------------------------------------------------

SHAPES: list[tuple[int, ...]] = [(1000, 251), (3,), (), (100_003,), (0, 4), (200, 1001), (1,)]
"""More than a chunk of the CPU's; pieces begin and end inside of chunks."""
GROUPS = [0, 1, 1, 0, 2, 2, 0]
POINT = Point(((11, 1e-3), (12, -3e-2)))


def make_parameters(dtype: torch.dtype, device: torch.device) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(s, generator=generator) * 0.02).to(dtype).to(device)) for s in SHAPES]


def make_space(params: list[nn.Parameter], rounding: RoundingName) -> ParameterSpace:
    named = [(f"p{number}", parameter) for number, parameter in enumerate(params)]
    return ParameterSpace.of(named, GROUPS, Gaussian(), rounding)


def make_step(number: int) -> Step:
    terms = ((1000 + number, (1e-3, -2e-4, 0.0)), (2000 + number, (3e-5, 1e-3, 5e-4)))
    rounded = tuple((seed, tuple(map(round_coefficient, coefficients))) for seed, coefficients in terms)
    return Step(rounded, (round_fp32(1e-2), 0.0, round_fp32(1e-4)), number)


def assert_same_space(one: ParameterSpace, other: ParameterSpace) -> None:
    for a, b in zip(one.slices, other.slices, strict=True):
        assert same(a.weights, b.weights), a.info.name
    for a, b in zip(one.stores, other.stores, strict=True):
        assert_same_states(a, b)
    assert one.fingerprint() == other.fingerprint()


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
def test_updates_and_fingerprints(dtype: torch.dtype, rounding: RoundingName):
    here, there = (make_space(make_parameters(dtype, device), rounding) for device in (CPU, DEVICE))
    base = here.fingerprint()
    assert_same_space(there, here)
    for number in range(4):
        here.apply([make_step(number)])
        there.apply([make_step(number)])
        assert_same_space(there, here)
    assert here.fingerprint() != base


@pytest.mark.parametrize("dtype", DTYPES)
def test_moving_to_a_point_and_back(dtype: torch.dtype):
    here, there = (make_space(make_parameters(dtype, device), "stochastic") for device in (CPU, DEVICE))
    base, kept = there.fingerprint(), there.save()
    here.move_to(POINT, here.save())
    there.move_to(POINT, kept)
    assert_same_space(there, here)
    assert there.fingerprint() != base
    there.restore(kept)
    assert there.fingerprint() == base
    rows = torch.tensor([6, 0, 999, 3, 3])
    for piece, moved in zip(there.slices, here.slices, strict=True):
        out = torch.empty_like(piece.weights)
        there.perturb(piece, [(POINT, out)])
        assert same(out, moved.weights), piece.info.name
    some = there.perturbed_rows(there.slices[0], rows.to(DEVICE), POINT)
    assert same(some, here.slices[0].weights.view(1000, 251)[rows])
    assert there.fingerprint() == base
