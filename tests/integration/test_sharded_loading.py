"""Loading straight into pieces gives, on every rank, the pieces of what loading the whole model gives."""

import json
import os
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import exit_codes
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)
from transformers.utils import logging

from mezo_lightning.models.pretrained import DTYPES, Pretrained
from mezo_lightning.sharding.loading import empty_model, load_sharded

KINDS = ("opt", "gpt2", "llama")

# -- processes ---------------------------------------------------------------------------------------------------------


def on_ranks(work: Callable[..., Any], world_size: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``work(placement, *arguments)`` returns on each of several processes of one job."""
    codes = exit_codes(_rank, world_size, folder, work, arguments)
    assert codes == [0] * world_size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world_size)]


def _rank(environment: dict[str, str], folder: Path, work: Callable[..., Any], arguments: Any) -> None:
    os.environ |= environment
    rank, world_size = (int(environment[name]) for name in ("RANK", "WORLD_SIZE"))
    from mezo_lightning.sharding.zero3 import Sharded

    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    result = work(Sharded(rank, world_size, torch.device("cpu"), "whole"), *arguments)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()


# -- the same as loading the whole model -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model to load."""

    folder: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``Pretrained``."""


def compare(placement: Any, cases: dict[str, Case]) -> dict[str, list[str]]:
    """What differs between loading in pieces and loading the whole model, for each case."""
    found = {}
    for name, case in cases.items():
        pretrained = Pretrained(case.folder, **case.options)
        whole = pretrained.load(case.dtype)
        state = torch.get_rng_state()
        torch.set_default_dtype(case.dtype)  # as Lightning does, and with a device it has another default, too
        with torch.device("meta"):
            cut = load_sharded(pretrained, case.dtype, placement)
        torch.set_default_dtype(torch.float32)
        found[name] = ["the global generator"] * (not torch.equal(state, torch.get_rng_state()))
        found[name] += [*differences(whole, cut), *wrong_pieces(whole, cut, placement)]
        ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode(), placement.present(cut):
            if not torch.equal(whole(input_ids=ids).logits, cut(input_ids=ids).logits):
                found[name].append("logits")
    return found


def differences(whole: nn.Module, other: nn.Module) -> list[str]:
    """Whatever differs but the values and shapes of parameters."""
    found = []
    for what, describe in {
        "parameters": lambda model: [(n, p.dtype, p.requires_grad) for n, p in model.named_parameters()],
        "ties": ties,
        "modules": lambda model: [(n, type(m).__name__, m.training) for n, m in model.named_modules()],
        "config": lambda model: model.config.to_dict(),
        "name": lambda model: (model.config.name_or_path, model.name_or_path),
        "generation config": lambda model: model.generation_config.to_dict(),
        "names of buffers": lambda model: [n for n, _ in model.named_buffers()],
        "names of weights": lambda model: list(model.state_dict()),
    }.items():
        if describe(whole) != describe(other):
            found.append(what)
    for (name, one), two in zip(whole.named_buffers(), other.buffers(), strict=True):
        if one.dtype != two.dtype or one.device != two.device or not torch.equal(one, two):
            found.append(f"buffer {name}")
    return found


def ties(model: nn.Module) -> set[frozenset[str]]:
    """The names of parameters, those of one parameter together."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return {frozenset(some) for some in names.values()}


def wrong_pieces(whole: nn.Module, cut: nn.Module, placement: Any) -> list[str]:
    """Parameters of which this rank's piece is not the one of the whole parameter, or the pieces are not all of it."""
    found = []
    pieces = placement.named_parameters(cut)
    for (name, parameter), (_, piece) in zip(whole.named_parameters(), pieces, strict=True):
        expected = parameter.detach().view(-1)[piece.begin : piece.begin + piece.numel()]
        if piece.whole != parameter.shape or piece.requires_grad != parameter.requires_grad:
            found.append(f"{name}: {piece.whole}")
        if not torch.equal(piece.detach().view(torch.uint8), expected.view(torch.uint8)):
            found.append(f"values of {name}")
    spans = placement.ranks.gather(lambda: [(piece.begin, piece.numel()) for _, piece in pieces])
    for (name, parameter), *held in zip(whole.named_parameters(), *spans, strict=True):
        at = 0
        for begin, numel in held:
            if numel and begin != at:
                found.append(f"{name} is cut at {begin}")
            at += numel
        if at != parameter.numel():
            found.append(f"{at} elements of {name}")
    return found


def lora(**options: Any) -> dict[str, Any]:
    return {"adapter": {"peft_type": "LORA", "r": 3, "target_modules": ["q_proj", "v_proj"], **options}}


@pytest.fixture(scope="module")
def models(folders, make_model, tmp_path_factory) -> dict[str, str]:
    """Folders of all sorts of models."""
    result = {kind: folders[kind] for kind in KINDS}

    def new(name: str) -> Path:
        result[name] = tmp_path_factory.mktemp("model") / name
        return result[name]

    for kind in KINDS:
        make_model(kind).save_pretrained(new(f"{kind}, many files"), max_shard_size="20KB")
    save_odd(new("odd"))
    old = new("opt, old") / "model.safetensors"
    make_model("opt").save_pretrained(old.parent)
    weights = {name.removeprefix("model."): weight for name, weight in load_file(old).items()}
    weights["lm_head.weight"] = weights.pop("decoder.embed_tokens.weight")
    save_file(weights, old)
    config = json.loads((old.parent / "config.json").read_text())
    (old.parent / "config.json").write_text(json.dumps(config | {"max_length": 33, "do_sample": True}))
    (old.parent / "generation_config.json").unlink()
    glm4_moe().save_pretrained(new("buffers"), save_original_format=False)
    return {name: str(folder) for name, folder in result.items()}


def save_odd(folder: Path) -> None:
    """A model whose parameters nearly all have odd numbers of elements, in files of a few kilobytes."""
    config = OPTConfig(
        vocab_size=321, hidden_size=33, word_embed_proj_dim=33, num_hidden_layers=2, num_attention_heads=3, ffn_dim=65,
        max_position_embeddings=97, init_std=0.2,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder, max_shard_size="20KB")


def glm4_moe() -> Glm4MoeForCausalLM:
    """A model with buffers that are weights, and that stay in fp32."""
    config = Glm4MoeConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, first_k_dense_replace=1, pad_token_id=None,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    return model


def cases_of(models: dict[str, str]) -> dict[str, Case]:
    """What is compared on two processes."""
    cases = {f"{kind} {dtype}": Case(models[kind], dtype) for kind in KINDS for dtype in DTYPES}
    cases |= {f"{kind}, many files": Case(models[f"{kind}, many files"], torch.bfloat16) for kind in KINDS}
    cases |= {f"odd {dtype}": Case(models["odd"], dtype) for dtype in DTYPES}
    cases |= {f"lora {dtype}": Case(models["opt"], dtype, lora()) for dtype in DTYPES}
    opt = models["opt"]
    return cases | {
        "other names, and nothing but lm_head": Case(models["opt, old"]),
        "embedded": Case("embedded/opt-stories", torch.bfloat16),
        "buffers": Case(models["buffers"], torch.bfloat16),
        "frozen": Case(models["odd"], options={"trainable": "bias|layer_norm"}),
        "lora of odd sizes": Case(models["odd"], options=lora(bias="all")),
        "lora of gpt2": Case(models["gpt2"], options=lora(target_modules=["c_attn"], fan_in_fan_out=True)),
        "lora of the embedding": Case(opt, options=lora(target_modules=["embed_tokens", "q_proj"])),
        "lora, some frozen": Case(opt, options=lora() | {"trainable": "lora_B"}),
        "lora, gaussian": Case(opt, options=lora(init_lora_weights="gaussian")),
        "modules to save": Case(models["odd"], torch.bfloat16, lora(modules_to_save=["lm_head", "final_layer_norm"])),
        "adapters": Case(models["llama"], torch.float16, lora(peft_type="LOKR")),
    }


NAMES = [*cases_of(dict.fromkeys([*KINDS, *(f"{k}, many files" for k in KINDS), "odd", "opt, old", "buffers"], ""))]


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory) -> list[dict[str, list[str]]]:
    """What differs in each case, on each of two processes."""
    return on_ranks(compare, 2, tmp_path_factory.mktemp("compared"), cases_of(models))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_the_whole_model(compared, name):
    assert [result[name] for result in compared] == [[], []]


@pytest.mark.slow
def test_one_rank_and_three(models, tmp_path):
    cases = {"odd": Case(models["odd"], torch.bfloat16, lora())}
    for world_size in (1, 3):
        results = on_ranks(compare, world_size, tmp_path, cases)
        assert results == [{"odd": []}] * world_size


def start_adapters(placement: Any, folder: str, adapters: list[dict[str, Any]]) -> dict[str, list[str]]:
    return compare(placement, {a["peft_type"]: Case(folder, options={"adapter": a}) for a in adapters})


@pytest.mark.slow
def test_adapters_that_are_not_refused_start_as_on_one_process(models, tmp_path):
    from mezo_lightning.sharding.loading import _STARTS

    more = {"ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": []}, "LORA": {"use_rslora": True}}
    names = _STARTS["peft_type"]
    adapters = [{"peft_type": name, "target_modules": ["q_proj", "v_proj"], **more.get(name, {})} for name in names]
    [result] = on_ranks(start_adapters, 1, tmp_path, models["opt"], adapters)
    assert result == {name: [] for name in names}


# -- without weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "opt, old", "buffers", "odd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_without_weights_is_otherwise_the_same(models, kind, dtype):
    pretrained = Pretrained(models[kind])
    model = empty_model(pretrained, dtype, Path(models[kind]))
    assert all(p.is_meta for p in model.parameters())
    whole = pretrained.load(dtype)
    weights = [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert [problem for problem in differences(whole, model) if problem.removeprefix("buffer ") not in weights] == []


def test_parameters_that_are_registered_twice_stay_one(models, monkeypatch):
    init = OPTForCausalLM.__init__

    def twice(self, config):
        init(self, config)
        self.one = self.two = nn.Parameter(torch.ones(3))

    monkeypatch.setattr(OPTForCausalLM, "__init__", twice)
    model = empty_model(Pretrained(models["opt"]), torch.float32, Path(models["opt"]))
    assert model.one is model.two


def test_models_made_afterwards_have_their_weights(models):
    empty_model(Pretrained(models["opt"]), torch.float32, Path(models["opt"]))
    assert not nn.Linear(2, 2).weight.is_meta


def test_what_cannot_be_perturbed_is_refused_as_in_one_process(models, tmp_path):
    with pytest.raises(ValueError, match="float64"):
        empty_model(Pretrained(models["opt"]), torch.float64, Path(models["opt"]))
    config = json.loads((Path(models["opt"]) / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantised"):
        empty_model(Pretrained(str(tmp_path)), torch.float32, tmp_path)
    RwkvForCausalLM(RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=2)).save_pretrained(tmp_path / "rwkv")
    messages = []
    for load in (lambda p: p.load(torch.float16), lambda p: empty_model(p, torch.float16, Path(p.name))):
        with pytest.raises(ValueError, match=r"float32 beside torch\.float16") as error:
            load(Pretrained(str(tmp_path / "rwkv")))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


NO_PLACEMENT: Any = None


@pytest.mark.parametrize(
    "options",
    [
        {"peft_type": "OSF"},
        {"peft_type": "DELORA"},
        {"peft_type": "LORA", "init_lora_weights": "pissa"},
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LORA", "trainable_token_indices": [1, 2]},
    ],
)
def test_adapters_made_from_whole_weights_are_refused_before_any_work(models, options):
    adapter = {"target_modules": ["q_proj"], **options}
    with pytest.raises(ValueError, match=r"whole weights.*replicated"):
        load_sharded(Pretrained(models["opt"], adapter=adapter), torch.float32, NO_PLACEMENT)


def test_bad_adapters_are_refused_before_any_work(models):
    with pytest.raises(ValueError, match="peft_type"):
        load_sharded(Pretrained(models["opt"], adapter={"r": 8}), torch.float32, NO_PLACEMENT)


def test_an_adapter_starts_alike_whatever_the_defaults_of_torch(models):
    pretrained = Pretrained(models["opt"], **lora())
    expected = pretrained.load(torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does while it loads a model
    try:
        found = pretrained.load(torch.bfloat16)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, one), other in zip(expected.named_parameters(), found.parameters(), strict=True):
        assert torch.equal(one, other), name


# -- errors and memory -------------------------------------------------------------------------------------------------


def failing_on_one_rank(placement: Any, folders: list[str]) -> str:
    try:
        load_sharded(Pretrained(folders[placement.ranks.rank]), torch.float32, placement)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.slow
def test_a_file_that_one_rank_cannot_read_is_an_error_on_all(models, tmp_path):
    broken = tmp_path / "broken"
    AutoModelForCausalLM.from_pretrained(models["opt"]).save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    del weights["model.decoder.layers.1.fc2.bias"]
    save_file(weights, broken / "model.safetensors")
    whole, broke = on_ranks(failing_on_one_rank, 2, tmp_path, [models["opt"], str(broken)])
    assert whole.startswith("RankError: rank 1 of 2 failed")
    assert broke.startswith("ValueError")
    assert all("layers.1.fc2.bias" in error for error in (whole, broke))


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) << 10


def growth(placement: Any, folder: str) -> dict[str, int]:
    """By how much loading makes anonymous memory grow, at most and at its end, and how much of the model is here."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, anonymous())

    before = anonymous()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        model = load_sharded(Pretrained(folder), torch.float32, placement)
    finally:
        done.set()
        thread.join()
    end = anonymous()
    share = sum(piece.numel() * piece.element_size() for _, piece in placement.named_parameters(model))
    return {"peak": max(peak, end) - before, "end": end - before, "share": share}


@pytest.mark.slow
def test_memory_grows_by_a_share_and_a_fixed_overhead(tmp_path):
    overhead = 16 << 20  # the code of the model that is imported, and what transformers and DeepSpeed keep of it
    config = LlamaConfig(
        vocab_size=16_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="70MB")
    sizes = [path.stat().st_size for path in (tmp_path / "model").glob("*.safetensors")]
    assert sum(sizes) > 300e6
    assert len(sizes) > 3
    for result in on_ranks(growth, 2, tmp_path, str(tmp_path / "model")):
        print(f"{result}, largest file {max(sizes)}")
        assert result["share"] < 0.51 * sum(sizes)
        assert result["end"] > 0.9 * result["share"]
        assert result["peak"] < result["share"] + overhead  # and not even the largest file
