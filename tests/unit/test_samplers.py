"""Promise 1: z is a pure function of (seed, position), with the same bits on every path."""

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezo_lightning import samplers
from mezo_lightning.samplers import (
    GOLDEN,
    SIGNIFICANT_BITS,
    Gaussian,
    LaneSampler,
    Rademacher,
    chunk_numel,
    derive_seed,
    fill_lanes,
    mix64,
)
from mezo_lightning.steps import round_coefficient

SAMPLERS = [Gaussian(), Rademacher()]
MASK = (1 << 64) - 1
MILLION = 1 << 20


def z(sampler: LaneSampler, seed: int, start: int, count: int) -> Tensor:
    return sampler.fill(torch.empty(count), seed, start)


def mix64_by_hand(x: int) -> int:
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def lane_by_hand(seed: int, position: int) -> int:
    key, increment = samplers._stream(seed)
    word = mix64_by_hand(key + (position // 4) * increment)
    return (word >> (16 * (position % 4))) & 0xFFFF


def test_mix64_is_splitmix64():
    # The first outputs of SplitMix64 with seed 0, as published with the generator.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    counters = torch.tensor([GOLDEN, 2 * GOLDEN & MASK, 3 * GOLDEN & MASK], dtype=torch.uint64).view(torch.int64)
    assert [value & MASK for value in mix64(counters).tolist()] == expected


@settings(derandomize=True, max_examples=60, deadline=None)
@given(seed=st.integers(0, MASK), start=st.integers(0, 2**63 - 1000), count=st.integers(1, 40))
def test_lanes_equal_arithmetic_on_python_integers(seed: int, start: int, count: int):
    lanes = fill_lanes(torch.empty(count, dtype=torch.int32), seed, start)
    assert lanes.tolist() == [lane_by_hand(seed, position) for position in range(start, start + count)]


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, MASK),
    start=st.one_of(st.integers(0, 9), st.integers(0, 2**62)),
    cuts=st.lists(st.integers(0, 3000), max_size=6),
    order=st.randoms(use_true_random=False),
)
def test_z_is_the_same_whatever_the_cuts_and_their_order(
    sampler: LaneSampler, seed: int, start: int, cuts: list[int], order: random.Random
):
    whole = z(sampler, seed, start, 3000)
    edges = sorted({0, 3000, *cuts})
    parts = list(itertools.pairwise(edges))
    order.shuffle(parts)
    pieced = torch.full((3000,), torch.nan)
    for begin, end in parts:
        sampler.fill(pieced[begin:end], seed, start + begin)
    assert torch.equal(pieced, whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("chunk", [4, 64, 1000, 4097])
def test_z_is_the_same_whatever_the_chunk(sampler: LaneSampler, chunk: int, monkeypatch: pytest.MonkeyPatch):
    whole = z(sampler, 7, 3, 10_001)
    monkeypatch.setattr(samplers, "chunk_numel", lambda device: chunk)
    monkeypatch.setattr(samplers, "_workspaces", samplers._Workspaces())
    assert torch.equal(z(sampler, 7, 3, 10_001), whole)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_z_is_the_same_across_the_end_of_a_chunk(sampler: LaneSampler):
    count = 2 * chunk_numel(torch.device("cpu")) + 5
    whole = z(sampler, 1, 2, count)
    at = chunk_numel(torch.device("cpu")) - 3
    assert torch.equal(whole[at : at + 7], z(sampler, 1, 2 + at, 7))
    assert torch.equal(whole[-7:], z(sampler, 1, 2 + count - 7, 7))


@pytest.mark.parametrize("sampler", SAMPLERS)
@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    seed=st.integers(0, MASK),
    starts=st.lists(st.integers(0, 2**61), min_size=1, max_size=8),
    width=st.integers(1, 70),
)
def test_rows_equal_fill(sampler: LaneSampler, seed: int, starts: list[int], width: int):
    rows = sampler.rows(seed, torch.tensor(starts), width)
    assert rows.dtype == torch.float32
    assert torch.equal(rows, torch.stack([z(sampler, seed, start, width) for start in starts]))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_z_is_the_same_on_other_threads_and_in_inference_mode(sampler: LaneSampler):
    whole = z(sampler, 5, 0, 100_000)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: z(sampler, 5, 0, 100_000), range(8)))
    with torch.inference_mode():
        found.append(z(sampler, 5, 0, 100_000))
    assert all(torch.equal(one, whole) for one in found)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_global_generators_are_never_touched(sampler: LaneSampler):
    before, python = torch.get_rng_state(), random.getstate()
    first = z(sampler, 5, 0, 1000)
    sampler.rows(5, torch.tensor([0, 8]), 4)
    derive_seed(1, 2)
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python
    torch.manual_seed(123)
    assert torch.equal(z(sampler, 5, 0, 1000), first)


def test_the_bits_do_not_change_between_versions():
    """Figures that old trajectories depend on; a change of the recipe needs a new format version."""
    assert derive_seed(0) == 0xE220A8397B1DCDAF
    assert derive_seed(42, 3, 1) == 13017598405723717874
    assert [round(x * 2**20) for x in z(Gaussian(), 42, 10, 5).tolist()] == [1203712, -37856, -337920, -404096, 37120]
    assert z(Rademacher(), 42, 10, 12).tolist() == [-1, 1, 1, 1, -1, 1, 1, -1, -1, -1, -1, -1]


def test_gaussian_moments():
    values = z(Gaussian(), 11, 0, 1 << 24).double()
    count = values.numel()
    assert abs(values.mean()) < 4 / count**0.5
    assert abs(values.square().mean() - 1) < 4 * (2 / count) ** 0.5
    assert abs(values.pow(3).mean()) < 4 * (15 / count) ** 0.5
    assert abs(values.pow(4).mean() - 2.9992) < 4 * (96 / count) ** 0.5
    assert values.abs().max() < 4.33


def test_gaussian_table_is_symmetric_of_unit_variance_and_short():
    table = Gaussian().from_lanes(torch.arange(65536, dtype=torch.int32), torch.empty(65536)).double()
    assert torch.equal(table, -table.flip(0))
    assert bool((table.diff() >= 0).all())
    assert abs(table.square().mean() - 1) < 1e-6
    mantissa = torch.frexp(table).mantissa * 2**SIGNIFICANT_BITS
    assert torch.equal(mantissa, mantissa.round())
    assert bool((table != 0).all())


def test_rademacher_is_fair_and_of_both_signs():
    values = z(Rademacher(), 11, 0, 1 << 22)
    assert set(values.unique().tolist()) == {-1.0, 1.0}
    assert abs(values.double().mean()) < 4 / values.numel() ** 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_neighbouring_positions_are_uncorrelated(sampler: LaneSampler):
    values = z(sampler, 3, 0, MILLION + 64)
    first = values[:MILLION].double()
    for lag in (*range(1, 17), 32, 64):
        correlation = float(first @ values[lag : lag + MILLION].double()) / MILLION
        assert abs(correlation) < 4.5 / MILLION**0.5, lag


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_directions_of_different_seeds_are_uncorrelated(sampler: LaneSampler):
    """Neighbouring seeds, those of neighbouring steps and queries, and seeds that differ in a high bit."""
    step = derive_seed(0, 1)
    seeds = [0, 1, 2, 3, 1 << 32, 1 << 63, MASK, step, derive_seed(0, 2), derive_seed(step, 0), derive_seed(step, 1)]
    values = torch.stack([z(sampler, seed, 0, 1 << 18) for seed in seeds]).double()
    gram = values @ values.T / values.shape[1] - torch.eye(len(seeds))
    assert gram.abs().max() < 5 * (2 / values.shape[1]) ** 0.5


@pytest.mark.parametrize("pair", [(0, 1), (1, 2), (0, GOLDEN), (5, derive_seed(5, 0))])
def test_no_direction_is_a_shifted_copy_of_another(pair: tuple[int, int]):
    """With one shared increment, the words of every seed would be one sequence from different places."""
    (_, first), (_, second) = map(samplers._stream, pair)
    assert first != second
    a, b = (z(Gaussian(), seed, 0, 1 << 14) for seed in pair)
    # Circular correlation at all shifts at once; a shifted copy would show as about 1/2 or more.
    spectrum = torch.fft.rfft(a.double(), 2 * a.numel()) * torch.fft.rfft(b.double(), 2 * b.numel()).conj()
    assert torch.fft.irfft(spectrum).abs().max() / a.numel() < 6 / a.numel() ** 0.5


@settings(derandomize=True, max_examples=100, deadline=None)
@given(seed=st.integers(0, MASK))
def test_increments_are_odd_and_change_often(seed: int):
    _, increment = samplers._stream(seed)
    assert increment % 2 == 1
    assert (increment ^ (increment >> 1)).bit_count() >= 24


def test_derived_seeds_do_not_collide():
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert derive_seed(1, 1) != derive_seed(2, 2)
    seeds = {derive_seed(base, step, query) for base in range(4) for step in range(500) for query in range(8)}
    seeds |= {derive_seed(base, step) for base in range(4) for step in range(500)}
    assert len(seeds) == 4 * 500 * 9
    assert all(0 <= seed <= MASK for seed in seeds)
    assert derive_seed(-1, 5) != derive_seed(1, 5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("coefficient", [1e-3, -1e-7, 3.3e-1, -2.5e-30, 7.7e20])
def test_a_weight_plus_a_product_is_one_rounding_of_the_exact_sum(sampler: LaneSampler, coefficient: float):
    coefficient = round_coefficient(coefficient)
    weights = torch.randn(MILLION, generator=torch.Generator().manual_seed(0)) * 0.02
    direction = z(sampler, 9, 1, MILLION)
    reference = (weights.double() + coefficient * direction.double()).float()
    assert torch.equal(weights + coefficient * direction, reference)
    assert torch.equal(weights.add(direction, alpha=coefficient), reference)
    assert torch.equal(torch.addcmul(weights, direction, torch.tensor(coefficient)), reference)


@pytest.fixture
def one_compiler() -> Iterator[None]:
    """No pool of processes that import torch, for the sake of a few kernels."""
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("one_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_compiled_and_eager_bits_are_equal(sampler: LaneSampler):
    """One fused kernel from counters to the sum, where a compiler may contract the product and the sum to one FMA."""
    count, start, seed = MILLION, 6, 21
    coefficient = round_coefficient(1e-3)
    key, increment = (samplers._signed(value) for value in samplers._stream(seed))
    table = samplers._quantiles(torch.device("cpu"))

    def fused(weights: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        words = mix64((positions // 4) * increment + key)
        lanes = (words >> (16 * (positions % 4))) & 0xFFFF
        direction = table[lanes] if isinstance(sampler, Gaussian) else 1.0 - 2.0 * (lanes >= 1 << 15)
        return direction, weights + coefficient * direction

    weights = torch.randn(count, generator=torch.Generator().manual_seed(0)) * 0.02
    direction, moved = torch.compile(fused)(weights, torch.arange(start, start + count))
    assert torch.equal(direction, z(sampler, seed, start, count))
    assert torch.equal(moved, weights.add(direction, alpha=coefficient))


@pytest.mark.slow
@pytest.mark.usefixtures("one_compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_samplers_own_code_compiles_to_the_same_bits(sampler: LaneSampler):
    eager = z(sampler, 33, 0, 10_000)
    samplers._stream(33)
    compiled = torch.compile(lambda lanes, out: sampler.from_lanes(lanes, out))
    assert torch.equal(compiled(fill_lanes(torch.empty(10_000, dtype=torch.int32), 33, 0), torch.empty(10_000)), eager)
    rows = torch.compile(lambda starts: sampler.rows(33, starts, 50))(torch.arange(0, 10_000, 50))
    assert torch.equal(rows.view(-1), eager)


def test_the_table_is_right_where_models_are_built_on_another_device():
    whole = z(Gaussian(), 5, 0, 100)
    samplers._quantiles.cache_clear()
    with torch.device("meta"):
        out = Gaussian().fill(torch.empty(100, device="cpu"), 5, 0)
    assert torch.equal(out, whole)
