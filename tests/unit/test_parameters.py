"""The flat vector: where everything lies, and that shards of it do what the whole does, bit for bit."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mezo_lightning import parameters
from mezo_lightning.parameters import ParameterSpace, Slice
from mezo_lightning.rounding import RoundingName
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler
from mezo_lightning.steps import DecayTowards, Point, Step, round_coefficient, round_fp32

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDINGS: list[RoundingName] = ["stochastic", "compensated", "master"]
KINDS = [(torch.float32, "stochastic"), *((dtype, rounding) for dtype in DTYPES[1:] for rounding in ROUNDINGS)]
SHAPES = [(7, 13), (5,), (), (3, 4, 5), (0, 4), (31, 11), (1,)]
GROUPS = [0, 1, 1, 0, 2, 2, 0]


def bits(weights: Tensor) -> Tensor:
    return weights.view(torch.int16 if weights.element_size() == 2 else torch.int32)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def make_parameters(dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype)) for shape in shapes]


def make_space(
    params: list[nn.Parameter], rounding: RoundingName, sampler: Sampler | None = None, groups: list[int] = GROUPS
) -> ParameterSpace:
    named = [(f"p{number}", parameter) for number, parameter in enumerate(params)]
    return ParameterSpace.of(named, groups[: len(params)], sampler or Gaussian(), rounding)


def step(number: int) -> Step:
    """A step with decay in one group, two directions, and a zero coefficient."""
    terms = (
        (1000 + number, (1e-3, -2e-4, 0.0)),
        (2000 + number, (3e-5, 1e-3, 5e-4)),
    )
    rounded = tuple((seed, tuple(map(round_coefficient, coefficients))) for seed, coefficients in terms)
    return Step(rounded, (round_fp32(1e-2), 0.0, round_fp32(1e-4)), number)


POINT = Point(((11, 1e-3), (12, -3e-2)))


def make_shards(params: list[nn.Parameter], cuts: list[int], rounding: RoundingName) -> list[ParameterSpace]:
    """The spaces of several ranks, each with weights of its own, which together hold the whole vector."""
    table = make_space(params, rounding).table
    total = table[-1].start + table[-1].numel
    edges = sorted({0, total, *(cut % (total + 1) for cut in cuts)})
    spaces = []
    for low, high in itertools.pairwise(edges):
        slices = []
        for info, parameter in zip(table, params, strict=True):
            begin, end = max(low - info.start, 0), min(high - info.start, info.numel)
            if begin < end:
                slices.append(Slice(info, parameter.detach().clone(), begin, end - begin))
        spaces.append(ParameterSpace(slices, table, Gaussian(), rounding))
    return spaces


def gather(spaces: list[ParameterSpace]) -> Tensor:
    return torch.cat([piece.weights for space in spaces for piece in space.slices])


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([parameter.data.view(-1) for parameter in params])


def test_the_table_lists_parameters_one_after_another():
    space = make_space(make_parameters(torch.float32), "stochastic")
    assert [info.start for info in space.table] == [0, 91, 96, 97, 157, 157, 498]
    assert [info.numel for info in space.table] == [91, 5, 1, 60, 0, 341, 1]
    assert space.numel == 499


def test_what_cannot_be_a_vector_is_refused_by_name():
    with pytest.raises(ValueError, match="no trainable parameter"):
        ParameterSpace.of([], [], Gaussian(), "stochastic")
    with pytest.raises(ValueError, match=r"'w' is not contiguous.*contiguous\(\)"):
        ParameterSpace.of([("w", torch.zeros(3, 4).T)], [0], Gaussian(), "stochastic")
    meta = torch.zeros(2, device="meta")
    with pytest.raises(ValueError, match=r"on several devices \(cpu, meta\)"):
        ParameterSpace.of([("w", torch.zeros(2)), ("v", meta)], [0, 0], Gaussian(), "stochastic")


@pytest.mark.parametrize("sampler", [Gaussian(), Rademacher()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_move_to_is_the_exact_sum_rounded(dtype: torch.dtype, sampler: Sampler):
    params = make_parameters(dtype)
    space = make_space(params, "stochastic", sampler)
    saved = space.save()
    reference = flat(params).double()
    for seed, coefficient in POINT.terms:  # rounded to fp32 after each term, and to the weights' dtype at the end
        direction = sampler.fill(torch.empty(space.numel), seed, 0)
        reference = (reference + coefficient * direction.double()).float().double()
    space.move_to(POINT, saved)
    assert same(flat(params), reference.float().to(dtype))
    space.restore(saved)
    assert same(flat(params), flat(make_parameters(dtype)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_and_perturbed_rows_equal_move_to(dtype: torch.dtype):
    params = make_parameters(dtype)
    space = make_space(params, "stochastic")
    saved = space.save()
    space.move_to(POINT, saved)
    moved = space.save()
    space.restore(saved)
    for piece, expected in zip(space.slices, moved, strict=True):
        out = torch.empty_like(expected)
        space.perturb(piece, [(POINT, out)])
        assert same(out, expected)
    rows = torch.tensor([6, 0, 3, 3])
    found = space.perturbed_rows(space.slices[0], rows, POINT)
    assert same(found, moved[0].view(7, 13)[rows])
    assert same(flat(params), flat(make_parameters(dtype)))


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
@settings(derandomize=True, max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 499), max_size=5), limit=st.sampled_from([61, 128, 1 << 18]))
def test_shards_give_the_bits_of_the_whole(dtype: torch.dtype, rounding: RoundingName, cuts: list[int], limit: int):
    params = make_parameters(dtype)
    whole = make_space(params, rounding)
    with pytest.MonkeyPatch.context() as patch:  # chunks that end elsewhere
        patch.setattr(parameters, "chunk_numel", lambda device: limit)
        shards = make_shards(params, cuts, rounding)

    assert sum(shard.fingerprint() for shard in shards) % 2**64 == whole.fingerprint()
    steps = [step(number) for number in range(3)]
    whole.apply(steps)
    for shard in shards:
        for one in steps:
            shard.apply([one])
    assert same(gather(shards), flat(params))
    assert sum(shard.fingerprint() for shard in shards) % 2**64 == whole.fingerprint()

    saved = [shard.save() for shard in shards]
    kept = whole.save()
    perturbed = []
    for shard in shards:
        for piece in shard.slices:
            perturbed.append(torch.empty_like(piece.weights))
            shard.perturb(piece, [(POINT, perturbed[-1])])
    whole.move_to(POINT, kept)
    for shard, own_saved in zip(shards, saved, strict=True):
        shard.move_to(POINT, own_saved)
    assert same(gather(shards), flat(params))
    assert same(torch.cat(perturbed), flat(params))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_shard_that_holds_whole_rows(dtype: torch.dtype):
    params = make_parameters(dtype)
    whole = make_space(params, "stochastic")
    [first, second] = make_shards(params, [4 * 13], "stochastic")
    rows = whole.perturbed_rows(whole.slices[0], torch.arange(7), POINT)
    assert same(first.perturbed_rows(first.slices[0], torch.arange(4), POINT), rows[:4])
    assert same(second.perturbed_rows(second.slices[0], torch.arange(3), POINT), rows[4:])


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
def test_chunks_of_a_large_vector_do_not_show(dtype: torch.dtype, rounding: RoundingName):
    """More elements than a chunk, in parameters that begin and end inside of one."""
    shapes: list[tuple[int, ...]] = [(1000, 251), (3,), (100_003,), (200, 1001)]
    params = make_parameters(dtype, shapes)
    whole = make_space(params, rounding)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parameters, "chunk_numel", lambda device: 99_991)
        others = make_parameters(dtype, shapes)
        other = make_space(others, rounding)
    whole.apply([step(0)])
    other.apply([step(0)])
    assert same(flat(params), flat(others))
    whole.move_to(POINT, whole.save())
    other.move_to(POINT, other.save())
    assert same(flat(params), flat(others))


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
def test_steps_at_once_equal_steps_one_by_one(dtype: torch.dtype, rounding: RoundingName):
    steps = [step(0), Step(), step(1), Step(((3, (0.0, 0.0, 0.0)),), (0.0, 0.0, 0.0)), step(2)]
    params, others = make_parameters(dtype), make_parameters(dtype)
    make_space(params, rounding).apply(steps)
    space = make_space(others, rounding)
    for one in steps:
        space.apply([one])
    assert same(flat(params), flat(others))


@pytest.mark.parametrize("decaying", [True, False])
def test_apply_is_the_formula_with_exact_products_by_group(decaying: bool):
    """Each sum is rounded once. Decay is summed with the terms; without any, the terms are added to the weights."""
    params = make_parameters(torch.float32)
    space = make_space(params, "stochastic")
    one = step(0) if decaying else replace(step(0), decays=(0.0,) * 3)
    group = torch.cat([torch.full((p.numel(),), g) for p, g in zip(params, GROUPS, strict=True)])
    weights, decays = flat(params).double(), torch.tensor(one.decays).double()[group]
    reference = (-decays * weights).float().double() if decaying else weights
    for seed, coefficients in one.terms:
        direction = Gaussian().fill(torch.empty(space.numel), seed, 0).double()
        reference = (reference + torch.tensor(coefficients, dtype=torch.float64)[group] * direction).float().double()
    space.apply([one])
    assert same(flat(params), (weights + reference if decaying else reference).float())


SMALL_DECAYS = [(torch.float32, decay) for decay in (1e-9, 1e-8, 3.1e-8, 1e-7, 1e-6)] + [(torch.bfloat16, 1e-4)]


@pytest.mark.parametrize("towards", ["zero", "start"])
@pytest.mark.parametrize(("dtype", "decay"), SMALL_DECAYS)
def test_decay_arrives_on_average_however_small(dtype: torch.dtype, decay: float, towards: DecayTowards):
    """A last bit of these weights is some 1e-7 of them in fp32, and 6e-3 in bf16; directions move them by more."""
    count, size = 1 << 20, round_coefficient(3e-6)
    weights = nn.Parameter((torch.rand(count, generator=torch.Generator().manual_seed(0)) + 1).mul(0.02).to(dtype))
    space = ParameterSpace.of([("w", weights)], [0], Gaussian(), "stochastic")
    if towards == "start":
        space.start = [torch.zeros(count, dtype=dtype)]
    before = weights.detach().double()
    space.apply(
        [Step(((1, (sign * size,)),), (round_fp32(decay),), number, towards) for number, sign in ((1, 1), (2, -1))]
    )
    change = (weights.detach().double() - before) / before
    error = 5 * float(change.std()) / math.sqrt(count)
    assert error < decay
    assert float(change.mean()) == pytest.approx(-2 * decay, abs=error)


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
def test_groups_without_a_coefficient_keep_their_bits(dtype: torch.dtype, rounding: RoundingName):
    """Negative zeros included: adding 0 * z would turn them into zeros."""
    params = make_parameters(dtype)
    for parameter in params:
        parameter.data.view(-1)[::2] = -0.0
    before = [parameter.data.clone() for parameter in params]
    make_space(params, rounding).apply([Step(((5, (0.0, round_coefficient(1e-2), 0.0)),), (0.0, 0.0, 0.0))])
    for parameter, old, group in zip(params, before, GROUPS, strict=True):
        assert same(parameter.data.view(-1), old.view(-1)) == (group != 1 or parameter.numel() == 0)


def test_several_steps_round_with_unrelated_lanes():
    """The same update again and again must not be rounded the same way again and again."""
    params = [nn.Parameter(torch.full((100_000,), 1.0, dtype=torch.bfloat16))]
    space = make_space(params, "stochastic", Rademacher(), groups=[0])
    size = round_coefficient(2.0**-13)  # 1/64 of the spacing above 1, 1/32 of that below
    space.apply([Step(((seed, (size,)),), (0.0,), seed) for seed in range(16)])
    moved = torch.stack([Rademacher().fill(torch.empty(100_000), seed, 0) for seed in range(16)]).sum(0) * size
    drift = (params[0].data.double() - 1.0 - moved).mean()
    assert abs(drift) < 5 * (16 * 2.0**-7 * 2.0**-13 / 100_000) ** 0.5


@settings(derandomize=True, max_examples=100, deadline=None)
@given(at=st.integers(0, 498), bit=st.integers(0, 15))
def test_the_fingerprint_sees_every_bit(at: int, bit: int):
    params = make_parameters(torch.bfloat16)
    space = make_space(params, "stochastic")
    before = space.fingerprint()
    [piece] = [piece for piece in space.slices if piece.start <= at < piece.start + len(piece)]
    piece.weights.view(torch.int16)[at - piece.start] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert space.fingerprint() != before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fingerprint_sees_weights_change_places(dtype: torch.dtype):
    params = make_parameters(dtype)
    space = make_space(params, "stochastic")
    before = space.fingerprint()
    assert before == make_space(make_parameters(dtype), "stochastic").fingerprint()
    params[0].data[0, :2] = params[0].data[0, :2].flip(0)
    assert space.fingerprint() != before


def test_the_global_generator_is_not_touched_and_nothing_needs_gradients():
    params = make_parameters(torch.bfloat16)
    state = torch.get_rng_state()
    space = make_space(params, "stochastic")
    space.apply([step(0)])
    space.move_to(POINT, space.save())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad_fn is None and parameter.requires_grad for parameter in params)
