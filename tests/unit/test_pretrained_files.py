import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.sharding.pretrained_files import PretrainedFiles, base_folder, safetensors_files

INDEX = "model.safetensors.index.json"
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]


class AnyShapes(PreTrainedModel):
    """A model whose weights are given."""

    config_class = PreTrainedConfig
    base_model_prefix = "model"

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__(PreTrainedConfig())
        for name, weight in weights.items():
            self.register_buffer(name, weight)


def rewrite(folder: Path, change) -> None:
    """Replace the weights in a folder of one file by what ``change`` makes of them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


@pytest.fixture
def saved(make_model, tmp_path):
    """`saved(kind, split=False)`: a folder of a tiny model; split into several files if asked."""

    def save(kind: str, split: bool = False) -> Path:
        folder = tmp_path / f"{kind}-{split}"
        make_model(kind).save_pretrained(folder, max_shard_size="20KB" if split else "1GB")
        assert (folder / INDEX).is_file() == split
        return folder

    return save


def assert_as_from_pretrained(folder: Path, model: PreTrainedModel) -> None:
    """All of the model's names stand for the values that transformers would load."""
    files = PretrainedFiles(folder, model)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(files.shapes) == set(expected) == set(files.places)
    for name, weight in expected.items():
        assert files.shapes[name] == weight.shape
        assert torch.equal(files.read(name, 0, weight.numel()).view(weight.shape), weight), name


shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_piece_of_any_weight(tmp_path_factory, shape, dtype, data):
    weight = torch.randint(0, 200, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    folder = tmp_path_factory.mktemp("any")
    save_file({"weight": weight}, folder / "model.safetensors")
    files = PretrainedFiles(folder, AnyShapes({"weight": torch.empty(shape, dtype=dtype)}))
    begin = data.draw(st.integers(0, weight.numel()))
    end = data.draw(st.integers(begin, weight.numel()))
    piece = files.read("weight", begin, end)
    assert piece.dtype == dtype
    assert piece.shape == (end - begin,)
    assert torch.equal(piece, weight.reshape(-1)[begin:end])


def test_defaults_of_torch_do_not_matter(saved, make_model):
    folder = saved("opt")
    files = PretrainedFiles(folder, make_model("opt"))
    with torch.device("meta"):
        assert files.read("model.decoder.final_layer_norm.bias", 0, 3).device.type == "cpu"


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("split", [False, True])
def test_names_are_those_of_from_pretrained(saved, make_model, kind, split):
    folder = saved(kind, split)
    assert len(safetensors_files(folder)) == 1 if not split else len(safetensors_files(folder)) > 1
    assert_as_from_pretrained(folder, make_model(kind, seed=1))


def test_several_files_need_no_index(saved, make_model):
    folder = saved("opt", split=True)
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    (folder / INDEX).unlink()
    files = PretrainedFiles(folder, make_model("opt", seed=1))
    assert all(torch.equal(files.read(name, 0, w.numel()), w.view(-1)) for name, w in expected.items())


@pytest.mark.parametrize(("kind", "prefix"), [("opt", "model."), ("gpt2", "transformer."), ("llama", "model.")])
def test_names_without_the_prefix_of_the_base_model(saved, make_model, kind, prefix):
    folder = saved(kind)
    rewrite(folder, lambda weights: {name.removeprefix(prefix): weight for name, weight in weights.items()})
    assert_as_from_pretrained(folder, make_model(kind, seed=1))


def test_names_with_a_prefix_that_the_model_does_not_have(saved, make_model):
    folder = saved("opt")
    expected = make_model("opt").model.state_dict()
    files = PretrainedFiles(folder, make_model("opt", seed=1).model)
    assert files.shapes.keys() == expected.keys()
    assert all(torch.equal(files.read(name, 0, w.numel()), w.view(-1)) for name, w in expected.items())


def test_names_that_transformers_has_changed(tmp_path):
    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors")
    assert_as_from_pretrained(tmp_path, GPTNeoXForCausalLM(config))


def test_what_is_computed_from_several_weights_is_refused(tmp_path):
    config = Qwen2MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=24, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=3,
        num_experts_per_tok=2, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "experts")
    with pytest.raises(ValueError, match=r"experts\.0.*transformers computes.*save_original_format=False"):
        PretrainedFiles(tmp_path / "experts", model)
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    assert_as_from_pretrained(tmp_path / "stacked", Qwen2MoeForCausalLM(config))


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("held", ["source", "target", "both"])
def test_tied_weights_under_any_of_their_names(saved, make_model, kind, held):
    folder = saved(kind)
    model = make_model(kind, seed=1)
    [embedding] = [name for name, p in model.named_parameters() if p is model.get_input_embeddings().weight]

    def change(weights):
        values = weights.pop(embedding)
        names = {"source": [embedding], "target": ["lm_head.weight"], "both": [embedding, "lm_head.weight"]}[held]
        return weights | {name: values.clone() for name in names}

    rewrite(folder, change)
    assert_as_from_pretrained(folder, model)


def test_tied_weights_that_differ_are_refused(saved, make_model):
    folder = saved("opt")

    def change(weights):
        other = weights["model.decoder.embed_tokens.weight"].clone()
        other[-1, -1] += 1
        return weights | {"lm_head.weight": other}

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"embed_tokens.*lm_head.*ties.*tie_word_embeddings"):
        PretrainedFiles(folder, make_model("opt"))


def test_weights_that_the_model_does_not_have_are_left_alone(saved, make_model):
    folder = saved("gpt2")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 96, 96)}  # gpt2's files on the Hub have it
    rewrite(folder, lambda weights: weights | mask)
    assert not mask.keys() & PretrainedFiles(folder, make_model("gpt2")).shapes.keys()


def test_a_missing_weight_a_wrong_shape_and_one_weight_twice(saved, make_model):
    folder, name = saved("opt"), "model.decoder.layers.1.fc1.weight"
    good = load_file(folder / "model.safetensors")

    def failing(weights: dict[str, Tensor], match: str) -> None:
        save_file(weights, folder / "model.safetensors")
        with pytest.raises(ValueError, match=match):
            PretrainedFiles(folder, make_model("opt"))

    failing({k: v for k, v in good.items() if k != name}, r"holds no weight '.*layers\.1\.fc1.weight'.*save_pretrained")
    failing({k: v for k, v in good.items() if "embed_tokens" not in k}, "embed_tokens.weight' or 'lm_head.weight'")
    failing(good | {name: good[name].T.contiguous()}, r"layers\.1\.fc1\.weight' as \(32, 64\).*\(64, 32\)")
    failing(good | {name.removeprefix("model."): good[name].clone()}, r"layers\.1\.fc1\.weight'.*both are 'model")


def test_files_that_are_missing_or_damaged(saved, make_model):
    folder = saved("opt", split=True)
    [first, *_] = safetensors_files(folder)
    content = first.read_bytes()
    first.write_bytes(content[:-10])
    with pytest.raises(ValueError, match="damaged"):
        PretrainedFiles(folder, make_model("opt"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=first.name):
        PretrainedFiles(folder, make_model("opt"))
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors weights"):
        safetensors_files(folder)


def test_other_files_in_the_folder_are_not_read(saved):
    folder = saved("opt", split=True)
    named = safetensors_files(folder)
    save_file({"x": torch.ones(1)}, folder / "consolidated.safetensors")
    assert safetensors_files(folder) == named
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")  # which from_pretrained prefers, too
    assert safetensors_files(folder) == [folder / "model.safetensors"]


# -- where the files are -----------------------------------------------------------------------------------------------


def test_what_has_no_weights_to_read_is_refused(saved):
    folder = saved("opt")
    assert base_folder(Pretrained(str(folder))) == folder
    assert (base_folder(Pretrained("embedded/opt-stories")) / "config.json").is_file()
    (folder / "x.gguf").touch()
    with pytest.raises(ValueError, match=r"GGUF.*models\.export.*replicated"):
        base_folder(Pretrained(str(folder), gguf_file="x.gguf"))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter"):
        base_folder(Pretrained(str(folder)))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles"):
        base_folder(Pretrained(str(folder)))


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """`cached(folder)`: put a copy of a folder into the Hub's cache, as someone/model, and cut the network off."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, revision: str = "main") -> Path:
        repository, commit = tmp_path / "cache" / "models--someone--model", "0123456789" * 4
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / revision).write_text(commit)
        return repository / "snapshots" / commit

    return put


@pytest.mark.parametrize("split", [False, True])
def test_a_hub_id_is_taken_from_the_cache(saved, make_model, cached, split):
    copy = cached(saved("opt", split))
    assert base_folder(Pretrained("someone/model")) == copy
    assert_as_from_pretrained(copy, make_model("opt", seed=1))


def test_a_revision_of_a_hub_id(saved, cached):
    copy = cached(saved("opt"), revision="v2")
    assert base_folder(Pretrained("someone/model", revision="v2")) == copy
    with pytest.raises(huggingface_hub.errors.LocalEntryNotFoundError):
        base_folder(Pretrained("someone/model"))


def test_a_hub_id_with_pickles_only(saved, cached):
    folder = saved("opt")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    cached(folder)
    with pytest.raises(ValueError, match=r"pickles.*refs/pr/1"):
        base_folder(Pretrained("someone/model"))
