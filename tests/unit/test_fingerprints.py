"""The fingerprint of frozen weights sees every bit and every place, and adds up over shards."""

import itertools

import pytest
import torch
from torch import Tensor, nn

from mezo_lightning.fingerprints import fingerprint_of, named_weights
from mezo_lightning.shards import Shard

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8, torch.int8, torch.int64]
SIZE = 100
BEGIN = (1 << 18) - SIZE // 2
"""A piece of a weight that begins here has a border of blocks in its middle."""


def values(dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = torch.randint(-1000, 1000, (SIZE,), generator=torch.Generator().manual_seed(0))
    return numbers.to(dtype) / 7 if dtype.is_floating_point else numbers.to(dtype)


def piece(numbers: Tensor, begin: int = BEGIN) -> Shard:
    return Shard(numbers, (BEGIN + SIZE,), begin, False)


def of(*weights: Tensor) -> int:
    return fingerprint_of((f"w{number}", weight) for number, weight in enumerate(weights))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_is_seen_and_every_pair_of_signs(dtype: torch.dtype):
    numbers, places = values(dtype), [0, SIZE // 2 - 1, SIZE // 2, SIZE - 1]
    octets = numbers.view(torch.uint8).view(SIZE, -1)
    before, last = of(piece(numbers)), octets.shape[1] - 1
    for place, octet, bit in itertools.product(places, range(octets.shape[1]), range(8)):
        octets[place, octet] ^= 1 << bit
        assert of(piece(numbers)) != before, (place, octet, bit)
        octets[place, octet] ^= 1 << bit
    for pair in itertools.combinations([*places, 10, 20, 30, 60, 70], 2):  # products of odd numbers must not cancel out
        octets[list(pair), last] ^= 128
        assert of(piece(numbers)) != before, pair
        octets[list(pair), last] ^= 128
    assert of(piece(numbers)) == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cuts", [(0, 50, 100), (0, 1, 49, 50, 51, 100, 100), (0, 0, 70, 100)])
def test_the_fingerprints_of_shards_add_up(dtype: torch.dtype, cuts: tuple[int, ...]):
    numbers = values(dtype)
    shards = [piece(numbers[begin:end], BEGIN + begin) for begin, end in itertools.pairwise(cuts)]
    assert sum(of(shard) for shard in shards) % 2**64 == of(piece(numbers))


def test_places_names_and_sizes_count_even_for_zeros():
    zeros, ones = torch.zeros(SIZE), torch.ones(SIZE)
    swapped = values()
    swapped[[0, 1]] = swapped[[1, 0]]
    kinds = [(), (zeros,), (zeros[:-1],), (zeros, zeros), (zeros, ones), (ones, zeros), (values(),), (swapped,)]
    found = [of(*some) for some in [*kinds, (piece(values()),)]]
    assert len(set(found)) == len(found)
    assert found[0] == 0
    named = {"a": ones, "b": zeros}
    assert fingerprint_of(named.items()) == fingerprint_of(reversed(named.items()))
    assert fingerprint_of(named.items(), without=["b"]) == fingerprint_of([("a", ones)])


@pytest.mark.parametrize(("numbers", "expected"), [
    (torch.arange(300_000, dtype=torch.float32), 13109097806412910112),
    (torch.arange(256, dtype=torch.uint8), 3653280857211634096),
])  # fmt: skip
def test_it_is_the_same_tomorrow(numbers: Tensor, expected: int):
    """Logs are to be read for years."""
    assert fingerprint_of([("a.weight", numbers)]) == expected


def test_what_a_checkpoint_holds_counts_once():
    model = nn.Sequential(nn.Embedding(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False))
    model[2].weight = model[0].weight
    model.register_buffer("table", torch.arange(3.0), persistent=False)  # follows from the configuration
    names = ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"]
    assert list(named_weights(model)) == names
    state = model.state_dict(keep_vars=True)
    assert all(weight is state[name] for name, weight in named_weights(model).items())
