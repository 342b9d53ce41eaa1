"""Low-rank directions and subsets of layers: exact, the same for every cut, and what the papers' equations say."""

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from closed_form import table_of
from torch import Tensor

from mezo_lightning import Flipout, Gaussian, LowRank, Rademacher, Scaled, Sparse, Subset
from mezo_lightning.parameters import ParameterInfo
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Sampler, derive_seed

SHAPES = {
    "embed.weight": (11, 6), "layers.0.w": (7, 5), "layers.0.b": (7,), "layers.1.w": (64, 48), "layers.1.b": (64,),
    "layers.2.conv": (3, 4, 5), "norm": (13,),
}  # fmt: skip
LOW_RANK = {
    "lozo": LowRank(2, refresh_left=0, refresh_right=3),
    "eggroll": LowRank(4, refresh_left=0, refresh_right=0),
    "subzero": LowRank(3, core="dense", refresh_left=2, refresh_right=2),
    "tezo": LowRank(5, core="diagonal", refresh_left=None, refresh_right=None),
}


TABLE = table_of(SHAPES)
NUMEL = TABLE[-1].start + TABLE[-1].numel


def z(sampler: Sampler, seed: int = 1, number: int = 0, table: list[ParameterInfo] = TABLE) -> Tensor:
    last = table[-1]
    return sampler.bind(table).fill(torch.empty(last.start + last.numel), seed, 0, number)


def of(name: str, direction: Tensor, table: list[ParameterInfo] = TABLE) -> Tensor:
    info = next(info for info in table if info.name == name)
    return direction[info.start : info.start + info.numel].view(info.shape)


# -- low rank ----------------------------------------------------------------------------------------------------------


def factor(key: int, rows: int, rank: int) -> Tensor:
    values = Gaussian().fill(torch.empty(rows * rank), key, 0).double()
    return ((values * 64).round() / 64).view(rows, rank)


@pytest.mark.parametrize("name", LOW_RANK)
def test_against_materialised_factors(name: str):
    """Z = U C V^T, scaled to variance 1, with a key for each factor, parameter and period."""
    config, seed, number = LOW_RANK[name], 21, 5
    direction = z(config, seed, number)

    def key(factor: int, period: int | None, start: int) -> int:
        if period == 0:
            return derive_seed(seed, factor, start)
        return derive_seed(config.seed or 0, factor, 0 if period is None else number // period, start)

    for info in TABLE:
        found = of(info.name, direction).double()
        if len(info.shape) == 1:
            assert torch.equal(found, Gaussian().fill(torch.empty(info.numel), seed, info.start).double())
            continue
        rows, width = info.shape[0], info.numel // info.shape[0]
        left = factor(key(0, config.refresh_left, info.start), rows, config.rank)
        right = factor(key(2, config.refresh_right, info.start), width, config.rank)
        core = factor(derive_seed(seed, 1, info.start), config.rank, config.rank)
        middle = {"identity": torch.eye(config.rank).double(), "diagonal": core.diagonal().diag(), "dense": core}
        scale = config.rank if config.core == "dense" else config.rank**0.5
        expected = left @ middle[config.core] @ right.T / scale
        assert torch.allclose(found.view(rows, width), expected, rtol=2**-12, atol=0)


@pytest.mark.parametrize("name", LOW_RANK)
def test_rank_and_size(name: str):
    table = table_of({"w": (300, 200)})
    samples = [of("w", z(LOW_RANK[name], seed, 0, table), table).double() for seed in range(20)]
    for sample in samples[:3]:
        spectrum = torch.linalg.svdvals(sample)
        assert float(spectrum[LOW_RANK[name].rank]) < 1e-3 * float(spectrum[0])  # what rounding the entries adds
    fresh = [z(LowRank(LOW_RANK[name].rank, LOW_RANK[name].core, 0, 0), seed, 0, table) for seed in range(200)]
    assert float(torch.cat(fresh).double().square().mean()) == pytest.approx(1.0, abs=0.1)


def test_how_long_factors_stay():
    lozo = LowRank(1, refresh_left=0, refresh_right=3)

    def row_space(seed: int, number: int) -> Tensor:
        return torch.linalg.svd(of("layers.1.w", z(lozo, seed, number)).double())[2][0].abs()

    assert torch.allclose(row_space(1, 0), row_space(2, 2), atol=1e-3)
    assert not torch.allclose(row_space(1, 2), row_space(1, 3), atol=1e-1)
    assert not torch.equal(z(lozo, 1), z(lozo, 2))


def test_parameters_and_seeds_have_factors_of_their_own():
    table = table_of({"a": (40, 40), "b": (40, 40)})
    for config in LOW_RANK.values():
        direction = z(config, 1, 0, table)
        assert abs(float(torch.corrcoef(direction.view(2, -1))[0, 1])) < 0.9
        assert not torch.equal(direction, z(config, 2, 0, table))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, r"rank=0.* at least 1"),
        ({"refresh_right": -1}, r"refresh_right=-1"),
        ({"core": "full"}, r"core='full'.*'identity', 'diagonal' or 'dense'"),
        ({"refresh_left": 5}, r"all directions of a step would be the same"),
    ],
)
def test_bad_low_rank(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        LowRank(**arguments)


# -- subsets -----------------------------------------------------------------------------------------------------------


def active(sampler: Sampler, number: int, seed: int = 1) -> set[str]:
    direction = z(sampler, seed, number)
    return {info.name for info in TABLE if bool(of(info.name, direction).any())}


def test_a_random_share_of_the_layers():
    sampler = Subset(fraction=0.4)  # of three: two
    chosen = [active(sampler, number) - {"embed.weight", "norm"} for number in range(60)]
    layers = [{name.split(".")[1] for name in names} for names in chosen]
    assert all(len(some) == 2 for some in layers)
    assert {layer for some in layers for layer in some} == {"0", "1", "2"}
    assert len({frozenset(some) for some in layers}) == 3
    assert active(sampler, 7, seed=1) == active(sampler, 7, seed=2)  # all directions of a step


def test_one_block_after_another():
    sampler = Subset(order="cyclic")
    chosen = [active(sampler, number) for number in range(6)]
    assert chosen[:3] == chosen[3:]
    assert all({"embed.weight", "norm"} <= names for names in chosen)
    assert [names - {"embed.weight", "norm"} for names in chosen[:3]] == [
        {"layers.0.w", "layers.0.b"}, {"layers.1.w", "layers.1.b"}, {"layers.2.conv"}
    ]  # fmt: skip


def test_within_a_block_the_directions_are_those_of_the_inner_sampler():
    direction, inner = z(Subset(Rademacher(), order="cyclic"), 4, 1), z(Rademacher(), 4)
    assert torch.equal(of("layers.1.w", direction), of("layers.1.w", inner))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction": 0.0}, r"fraction=0.0"),
        ({"order": "sorted"}, r"order='sorted'"),
        ({"blocks": "("}, r"Subset\(blocks\): '\(' is no regular expression"),
    ],
)
def test_bad_subset(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Subset(**arguments)


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("layers.0.w", "layers.0"),
        ("model.decoder.layers.11.fc1.weight", "layers.11"),  # OPT
        ("model.layers.0.mlp.up_proj.weight", "layers.0"),  # Llama
        ("transformer.h.3.attn.c_attn.weight", "h.3"),  # GPT-2
        ("gpt_neox.layers.2.attention.dense.bias", "layers.2"),
        ("roberta.encoder.layer.4.output.dense.weight", "layer.4"),
        ("bert.encoder.layer.10.attention.self.query.weight", "layer.10"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "block.2"),  # T5, where each block has a layer.0
        ("transformer.blocks.1.ffn.up_proj.weight", "blocks.1"),  # MPT
        ("base_model.model.model.layers.7.self_attn.q_proj.lora_A.default.weight", "layers.7"),  # PEFT
        ("path.0.weight", None),
        ("model.decoder.embed_tokens.weight", None),
        ("roberta.embeddings.LayerNorm.weight", None),
        ("roberta.pooler_layer.0.weight", None),
    ],
)
def test_the_blocks_are_the_layers_of_usual_models(name: str, block: str | None):
    match = re.search(Subset().blocks, name)
    assert (match and match.group()) == block


def test_blocks_that_no_parameter_has():
    with pytest.raises(ValueError, match=r"blocks='mlp'.* no trainable parameter"):
        z(Subset(blocks="mlp"))


# -- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LowRank, Subset, Flipout])
def test_a_sampler_without_a_seed_is_given_one_and_keeps_its_own(kind: type[LowRank | Subset | Flipout]):
    assert kind(seed=3).seeded(7) == kind(seed=3)
    found = kind().seeded(7)
    assert found == kind(seed=7)
    assert "seed=7" in repr(found)  # which is how a resumed run is told what another one had
    assert sampler_from_dict(json.loads(json.dumps(sampler_as_dict(found)))) == found
    assert torch.equal(z(kind()), z(kind(seed=0)))
    assert any(not torch.equal(z(found, 1, number), z(kind(), 1, number)) for number in range(5))


@pytest.mark.parametrize(
    "outer",
    [Subset(LowRank()), Flipout(LowRank()), Scaled({"w": 2.0}, LowRank()), Sparse(LowRank(), 0.5, {"w": 0.25})],
    ids=lambda outer: type(outer).__name__,
)
def test_so_is_the_sampler_that_another_one_is_made_of(outer: Any):
    assert outer.seeded(7).sampler == LowRank(seed=7)
    given = replace(outer, sampler=LowRank(seed=3)).seeded(7)
    assert given.sampler == LowRank(seed=3)
    assert getattr(given, "thresholds", None) == getattr(outer, "thresholds", None)
    assert sampler_from_dict(json.loads(json.dumps(sampler_as_dict(given)))) == given


def test_a_sampler_that_draws_nothing_of_its_own_has_no_seed():
    assert Gaussian().seeded(7) == Gaussian()
