"""Promise 4 in small: 16-bit stores lose no update, are right on average and keep what they need not change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezo_lightning.rounding import SUPPORTED_DTYPES, RoundingName, Store, fill_rounding_lanes, make_store
from mezo_lightning.samplers import fill_lanes

HALVES = [torch.bfloat16, torch.float16]
ROUNDINGS: list[RoundingName] = ["stochastic", "compensated", "master"]


def all_finite(dtype: torch.dtype) -> Tensor:
    patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    return patterns[patterns.isfinite()]


def bits(weights: Tensor) -> Tensor:
    return weights.view(torch.int16 if weights.element_size() == 2 else torch.int32)


def lanes_for(count: int, seed: int = 1) -> Tensor:
    return fill_lanes(torch.empty(count, dtype=torch.int32), seed, 0)


def read(store: Store, weights: Tensor) -> Tensor:
    out = torch.empty(weights.numel())
    store.read(weights, 0, out)
    return out


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("lanes", ["zeros", "ones", "random"])
def test_every_finite_number_survives_a_read_and_a_write(dtype: torch.dtype, rounding: RoundingName, lanes: str):
    weights = all_finite(dtype)
    original = weights.clone()
    store = make_store(weights, rounding)
    random = {"zeros": 0, "ones": 0xFFFF}
    draw = lanes_for(weights.numel()) if lanes == "random" else torch.full((weights.numel(),), random[lanes]).int()
    for _ in range(3):
        values = read(store, weights)
        assert torch.equal(values.view(torch.int32), original.float().view(torch.int32))  # -0.0 included
        store.write(weights, 0, values, draw)
        assert torch.equal(bits(weights), bits(original))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_stored_value_survives_further_reads_and_writes(dtype: torch.dtype, rounding: RoundingName):
    """After an update the low bits are in use; writing what was read must not move them, whatever the lanes."""
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(50_000, generator=generator) * 0.02).to(dtype)
    store = make_store(weights, rounding)
    store.write(weights, 0, read(store, weights) + 1e-5 * torch.randn(50_000, generator=generator), lanes_for(50_000))
    kept, state = weights.clone(), None if store.state is None else store.state.clone()
    for seed in range(3):
        store.write(weights, 0, read(store, weights), lanes_for(50_000, seed))
    assert torch.equal(bits(weights), bits(kept))
    assert state is None or (store.state is not None and torch.equal(store.state, state))


@pytest.mark.parametrize("dtype", HALVES)
@settings(derandomize=True, max_examples=200, deadline=None)
@given(value=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_stochastic_rounding_takes_one_of_the_two_neighbours(dtype: torch.dtype, value: float):
    weights = torch.zeros(64, dtype=dtype)
    largest = torch.finfo(dtype).max
    make_store(weights, "stochastic").write(weights, 0, torch.full((64,), value), lanes_for(64))
    exact = max(-largest, min(largest, value))  # beyond the largest number there is no infinity
    spacing = max(abs(exact) * torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
    assert bool(weights.isfinite().all())
    assert bool(((weights.double() - exact).abs() <= spacing).all())


def edges(dtype: torch.dtype) -> list[float]:
    """Magnitudes where an ordinal's arithmetic could go wrong: the least numbers, the least normal, powers of two."""
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    normal = torch.finfo(dtype).smallest_normal
    return [least / 3, least * 1.3, normal - 0.3 * least, normal + 0.3 * least, 2.0**-10 * 0.9999, 2.0**-10, 1.0, 0.02]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rounding_is_right_on_average(dtype: torch.dtype, rounding: RoundingName, sign: float):
    """Values just off every kind of number, over all 65,536 lanes: the mean is the value itself."""
    lanes = torch.arange(1 << 16, dtype=torch.int32)
    # The subnormals of bf16 are those of fp32, which has no further bits for them.
    for number in edges(dtype) if dtype == torch.float16 else edges(dtype)[4:]:
        for offset in (0.0, 1e-4, 1.0 / 3, 0.5, 0.77):
            spacing = max(abs(number) * torch.finfo(dtype).eps / 2, 2.0**-24 if dtype == torch.float16 else 0)
            value = torch.full((1 << 16,), sign * (number + offset * spacing))
            weights = torch.zeros(1 << 16, dtype=dtype)
            store = make_store(weights, rounding)
            store.write(weights, 0, value, lanes)
            error = (read(store, weights).double().mean() - value[0].double()).abs() / spacing
            # What an ordinal with 13 or 16 further bits cannot hold is cut off.
            assert error < 2.0**-12, (number, offset, float(error))


@pytest.mark.parametrize("dtype", HALVES)
def test_compensated_weights_are_the_value_rounded_to_nearest(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    weights = (torch.randn(100_000, generator=generator) * 0.02).to(dtype)
    store = make_store(weights, "compensated")
    store.write(weights, 0, torch.randn(100_000, generator=generator) * 0.02, lanes_for(100_000))
    value = read(store, weights)
    nearest = value.to(dtype)
    ties = (value - nearest.float()).abs() == (value - weights.float()).abs()
    assert bool(((bits(weights) == bits(nearest)) | ties).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_compensated_keeps_eight_further_bits(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100_000, generator=generator) * 0.02
    weights = torch.zeros(100_000, dtype=dtype)
    store = make_store(weights, "compensated")
    store.write(weights, 0, values, lanes_for(100_000))
    least = 2.0**-24 if dtype == torch.float16 else 0.0
    spacing = (values.abs() * torch.finfo(dtype).eps).clamp(min=least)
    assert bool(((read(store, weights) - values).abs() <= spacing / 256).all())


def test_compensated_holds_values_between_zero_and_the_least_number():
    """The sign is the weight's: a small negative value lives beside -0.0."""
    values = torch.tensor([2.0**-26, -(2.0**-26), 2.0**-28, -(2.0**-28)])
    weights = torch.zeros(4, dtype=torch.float16)
    store = make_store(weights, "compensated")
    store.write(weights, 0, values, torch.zeros(4, dtype=torch.int32))
    assert torch.equal(read(store, weights), values)
    assert weights.signbit().tolist() == [False, True, False, True]


@pytest.mark.parametrize("dtype", HALVES)
def test_the_master_is_fp32(dtype: torch.dtype):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1000, dtype=dtype)
    store = make_store(weights, "master")
    store.write(weights, 0, values, lanes_for(1000))
    assert torch.equal(read(store, weights), values)
    assert torch.equal(weights, values.to(dtype))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_fp32_weights_are_written_as_they_are(rounding: RoundingName):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights = torch.zeros(1000)
    store = make_store(weights, rounding)
    store.write(weights, 0, values, lanes_for(1000))
    assert torch.equal(weights, values)
    assert store.state is None


@pytest.mark.parametrize(("rounding", "extra"), [("stochastic", 0), ("compensated", 1), ("master", 4)])
@pytest.mark.parametrize("dtype", HALVES)
def test_bytes_beside_the_weights(dtype: torch.dtype, rounding: RoundingName, extra: int):
    state = make_store(torch.zeros(1000, dtype=dtype), rounding).state
    assert (0 if state is None else state.numel() * state.element_size()) == extra * 1000


def test_lanes_are_new_for_every_step_and_mirrored_in_pairs_for_compensated():
    def lanes(rounding: RoundingName, number: int) -> Tensor:
        out = torch.empty(10_000, dtype=torch.int32)
        fill_rounding_lanes(out, rounding, number, 3)
        assert 0 <= int(out.min()) < int(out.max()) < 1 << 16
        return out

    for number in (0, 2, 4):
        assert torch.equal(
            lanes("compensated", number) + lanes("compensated", number + 1), torch.full((10_000,), 65535)
        )
    steps = [lanes("stochastic", number) for number in range(4)] + [lanes("compensated", number) for number in (8, 10)]
    correlation = torch.corrcoef(torch.stack(steps).double()) - torch.eye(len(steps))
    assert correlation.abs().max() < 0.05


def test_wrong_names_and_dtypes_are_refused_by_name():
    with pytest.raises(ValueError, match=r"float64.*supported are torch\.float32"):
        make_store(torch.zeros(3, dtype=torch.float64), "stochastic")
    with pytest.raises(ValueError, match="rounding='nearest' is unknown; choose"):
        make_store(torch.zeros(3), "nearest")  # pyright: ignore[reportArgumentType]
    assert torch.float32 in SUPPORTED_DTYPES
