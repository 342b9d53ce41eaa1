"""Prefix and prompt tuning: right in every batch, at every position, from real activations, in either evaluator."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import PreTrainedModel

from mezo_lightning.encoding import Encoding
from mezo_lightning.evaluators import Copy
from mezo_lightning.generation import Generate
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.models.pretrained import Pretrained, base_model, export
from mezo_lightning.models.virtual_tokens import VirtualTokens, virtual_tokens
from mezo_lightning.objectives import CrossEntropy
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.samplers import Gaussian
from mezo_lightning.scoring import Scorer
from mezo_lightning.sharding.loading import load_sharded
from mezo_lightning.sharding.zero3 import Sharded
from mezo_lightning.startup import check_every_kind_counts, logits
from mezo_lightning.steps import Point

COUNT = 3
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": COUNT}
PROMPT = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": COUNT}
KINDS = ["opt", "gpt2", "llama"]
ADAPTERS = [pytest.param(PREFIX, id="prefix"), pytest.param(PROMPT, id="prompt")]


@pytest.fixture
def saved(make_model, tokenizer, tmp_path):
    """`saved(kind)`: the folder of a tiny model."""

    def save(kind: str) -> str:
        make_model(kind).save_pretrained(tmp_path / kind)
        tokenizer.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


def virtual(model: Any) -> VirtualTokens:
    found = virtual_tokens(model)
    assert found is not None
    return found


def trainable(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_score_does_not_depend_on_the_batch(saved, tokenizer, make_batch, kind, adapter):
    model = Pretrained(saved(kind), adapter=adapter).load()
    scorer = Scorer(model, Encoding().bind(model, tokenizer))
    batch = make_batch()
    together = scorer(batch.prompts, batch.targets).mean
    alone = torch.cat([scorer([p], [t]).mean for p, t in zip(batch.prompts, batch.targets, strict=True)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    plain = Pretrained(saved(kind)).load()
    without = Scorer(plain, Encoding().bind(plain, tokenizer))(batch.prompts, batch.targets).mean
    assert (together - without).abs().min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_completions_do_not_depend_on_the_batch(saved, tokenizer, make_batch, kind, adapter):
    model = Pretrained(saved(kind), adapter=adapter).load()
    bound = Generate(max_new_tokens=8, temperature=1.0).bind(model, Encoding().bind(model, tokenizer))
    batch = make_batch()
    together = bound.complete(batch, seed=1)
    alone = [bound.complete(batch.select([i]), seed=1) for i in range(4)]
    assert together.ids == tuple(part.ids[0] for part in alone)
    assert len(set(together.ids)) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_is_written_is_what_the_scores_say(saved, tokenizer, make_batch, kind, adapter):
    """With a cache, token by token, positions go on behind prefix and prompt just as when all is read at once."""
    model = Pretrained(saved(kind), adapter=adapter).load()
    encoder = Encoding().bind(model, tokenizer)
    batch = make_batch()
    written = Generate(max_new_tokens=8, stop=()).bind(model, encoder).complete(batch, seed=0).ids
    for prompt, ids in zip(batch.prompts, written, strict=True):
        start = encoder.prompt(prompt)
        padded = encoder.pad([start + ids], model.device)
        with torch.no_grad():
            found = virtual(model).base(**virtual(model).in_front(padded)).logits[0]
        assert tuple(found[len(start) - 1 : -1].argmax(-1).tolist()) == ids


@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_starts_as_real_tokens_in_front(saved, make_model, kind):
    """A text behind the untrained prefix is a text behind the tokens whose activations it is."""
    model = Pretrained(saved(kind), adapter=PREFIX).load()
    ids = torch.randint(320, (1, COUNT), generator=torch.Generator().manual_seed(0))
    text = torch.tensor([[5, 60, 70, 80]])
    padded = {"input_ids": text, "attention_mask": torch.ones_like(text), "position_ids": torch.arange(4)[None]}
    with torch.no_grad():
        found = virtual(model).base(**virtual(model).in_front(padded)).logits
        expected = make_model(kind)(torch.cat([ids, text], dim=-1)).logits[:, COUNT:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_starts_alike_every_time(saved, adapter, dtype):
    folder, state = saved("llama"), torch.get_rng_state()
    model = Pretrained(folder, adapter=adapter).load(dtype)
    assert torch.equal(torch.get_rng_state(), state)
    [(name, weight)] = trainable(model).items()
    assert (weight.dtype, model.training) == (dtype, False)
    torch.manual_seed(99)
    torch.set_default_dtype(torch.float64)
    try:
        again = Pretrained(folder, adapter=adapter).load(dtype)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(trainable(again)[name], weight)
    if adapter is PROMPT:  # words, and no noise
        words = base_model(model).get_input_embeddings().weight
        assert all((words == row).all(-1).any() for row in weight)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_both_evaluators_reach_it(saved, tokenizer, make_batch, kind, adapter):
    model = Pretrained(saved(kind), adapter=adapter).load()
    bound = CrossEntropy().bind(model, tokenizer, Encoding())
    named = list(trainable(model).items())
    space = ParameterSpace.of(named, [0] * len(named), Gaussian(), "stochastic")
    points = (Point(), Point(((7, 0.1),)), Point(((7, -0.1),)))
    before = [p.clone() for _, p in named]
    copied, scratched = (
        evaluator(lambda: bound.samples(make_batch(), seed=0))(points)
        for evaluator in (Copy(space), LeafScratch(cast(torch.nn.Module, model), space))
    )
    assert all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
    assert len(set(copied.means)) == 3
    torch.testing.assert_close(copied.values, scratched.values, rtol=1e-6, atol=1e-6)
    encoder = Encoding().bind(model, tokenizer)
    check_every_kind_counts(space, Copy, lambda: logits(model, encoder, make_batch().prompts[:2]))


def test_virtual_tokens_take_their_part_of_the_context(saved, tokenizer, make_batch):
    model = Pretrained(saved("opt"), adapter=PREFIX).load()  # a context of 96
    encoder = Encoding().bind(model, tokenizer)
    assert encoder.limit == 96 - COUNT
    with pytest.raises(ValueError, match=r"93 tokens .*a context of 96, 3 of them for virtual tokens"):
        encoder.prompt("x" * 200)
    longest = replace(Encoding(), truncate=True).bind(model, tokenizer)
    text = longest.prompt("x" * 200, reserve=8)
    assert len(text) == 96 - COUNT - 8
    bound = Generate(max_new_tokens=8, stop=()).bind(model, longest)
    [ids] = bound.complete(make_batch(prompts=("x" * 200,) * 4).select([0]), seed=0).ids
    assert len(ids) == 8


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between PEFT and transformers
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_export_is_a_folder_of_peft(saved, tokenizer, tmp_path: Path, kind, adapter):
    model = Pretrained(saved(kind), adapter=adapter).load()
    with torch.no_grad():
        for weight in trainable(model).values():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    export(model, tokenizer, tmp_path / "out")
    opened = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert isinstance(opened, PeftModel)
    ids = torch.tensor([[5, 60, 70, 80]])
    padded = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(4)[None]}
    with torch.no_grad():
        ours = virtual(model).base(**virtual(model).in_front(padded)).logits
        theirs = opened(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -4:]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("adapter", "message"), [
    ({"peft_type": "PREFIX_TUNING"}, "num_virtual_tokens=None must be at least 1"),
    ({**PREFIX, "num_virtual_tokens": 0}, "num_virtual_tokens=0 must be"),
    ({**PREFIX, "prefix_projection": True}, "prefix_projection"),
    ({**PREFIX, "token_dim": 32}, "token_dim is read off the model"),
    ({"peft_type": "P_TUNING", "num_virtual_tokens": 2}, "P_TUNING is not supported.* PREFIX_TUNING or PROMPT"),
])  # fmt: skip
def test_refusals(saved, adapter, message):
    with pytest.raises(ValueError, match=message):
        Pretrained(saved("opt"), adapter=adapter).load()


def test_a_model_without_a_common_cache_is_refused(saved, monkeypatch):
    def without(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return {"past_key_values": None}

    folder = saved("gpt2")
    monkeypatch.setattr("transformers.models.gpt2.modeling_gpt2.GPT2Model.forward", without)
    with pytest.raises(ValueError, match="GPT2LMHeadModel does not"):
        Pretrained(folder, adapter=PREFIX).load()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_zero3_refuses_them_by_name(saved, adapter):
    with pytest.raises(ValueError, match=f"{adapter['peft_type']}.*--trainer.strategy replicated"):
        load_sharded(Pretrained(saved("opt"), adapter=adapter), torch.float32, cast(Sharded, None))
