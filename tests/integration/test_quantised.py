"""Adapters on bases of 8 and 4 bits: tuned, resumed, replayed and exported; and what is refused."""

import functools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import EPSILON, Command, assert_same, data_of, steps_of, trainer_of, weights
from transformers import AutoModelForCausalLM, PreTrainedModel

from mezo_lightning import CentralDifference, CrossEntropy, MeZO, MeZOModule
from mezo_lightning.models.pretrained import Pretrained, base_model, export
from mezo_lightning.models.quantised import quantisation_of, quantise, quantised_names, warn_of_small_epsilon
from mezo_lightning.sharding.loading import empty_model

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantised)")

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {**NF4, "bnb_4bit_quant_type": "fp4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BITS = [pytest.param(NF4, id="4bit"), pytest.param(INT8, id="8bit")]
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}


def loaded(folder: Path, quantization: dict[str, Any] | None, dtype: torch.dtype = torch.float32, **other: Any) -> Any:
    return Pretrained(str(folder), **({"adapter": LORA} | other), quantization=quantization).load(dtype)


def randomised(model: Any) -> Any:
    """The model with an adapter that does something."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[0, 60, 70, 80, 90, 100]])).logits


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_frozen_and_coarse(folders: dict[str, Path], kind: str, quantization: Any, dtype: torch.dtype):
    model, dense = loaded(folders[kind], quantization, dtype), loaded(folders[kind], None, dtype)
    codes = quantised_names(model)
    assert all(any(part in name for name in codes) for part in ("q_proj", "v_proj"))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable.keys() == {name for name, p in dense.named_parameters() if p.requires_grad}
    numbers = [p for name, p in model.named_parameters() if name not in codes]
    found, expected = logits(model), logits(dense)
    assert {p.dtype for p in numbers} == {dtype}  # also after a forward, which turns biases into what it computes in
    assert 0 < (found - expected).square().mean().sqrt() < 0.5 * expected.std()


@pytest.mark.parametrize("quantization", BITS)
def test_it_is_quantised_alike_from_files_and_from_weights(opt: Path, quantization: Any):
    dense = AutoModelForCausalLM.from_pretrained(opt).eval()
    config = quantisation_of(quantization, torch.float32)
    one, other = quantise(dense, config), base_model(loaded(opt, quantization, adapter=None, trainable="layer_norm"))
    assert one.generation_config.eos_token_id == other.generation_config.eos_token_id
    assert weights(one).keys() == weights(other).keys()
    assert all(torch.equal(w, other.state_dict()[name]) for name, w in one.state_dict().items())


@pytest.mark.parametrize("quantization", BITS)
def test_a_checkpoint_is_of_one_quantisation(opt: Path, folders: dict[str, Path], quantization: Any):
    model = randomised(loaded(opt, quantization))
    before = logits(model)  # and layers in the layout in which they compute
    state = model.state_dict()
    again = loaded(opt, quantization)
    again.load_state_dict(state)
    assert torch.equal(logits(again), before)
    again.load_state_dict(state)  # after a forward, too
    for folder, another in ((opt, FP4), (opt, NF4 if quantization is INT8 else INT8), (folders["opt2"], quantization)):
        with pytest.raises(ValueError, match="quantised otherwise"):
            loaded(folder, another).load_state_dict(state)


def test_a_forward_changes_nothing_on_any_cpu(opt: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = loaded(opt, NF4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("quantization", BITS)
def test_an_export_is_dense_and_computes_the_same(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, kind: str, quantization: Any
):
    model = randomised(loaded(folders[kind], quantization))
    before = {name: p.clone() for name, p in model.named_parameters()}
    export(model, tokenizer, tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {p.dtype for p in opened.parameters()} == {torch.float32}
    found, expected = logits(opened), logits(model)
    if quantization is NF4:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    else:  # 8-bit layers round what goes into them as well
        assert (found - expected).square().mean().sqrt() < 0.05 * expected.std()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_dense_weights_under_a_name_are_tuned_and_exported(opt: Path, tokenizer: Any, tmp_path: Path):
    model = loaded(opt, NF4, adapter=None, trainable="layer_norm")
    assert isinstance(model, PreTrainedModel)
    assert all("layer_norm" in name for name, p in model.named_parameters() if p.requires_grad)
    export(model, tokenizer, tmp_path / "out")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), logits(model), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(("quantization", "other", "message"), [
    (NF4, {"adapter": None}, "quantised weights cannot be perturbed; add an adapter"),
    (NF4, {"adapter": None, "trainable": "q_proj"}, "q_proj.weight': quantised weights cannot be perturbed"),
    ({"load_in_4bit": True}, {}, "names no quant_method"),
    ({"quant_method": "bitsandbytes"}, {}, "needs load_in_4bit: true or load_in_8bit: true"),
    ({"quant_method": "nothing"}, {}, "no quantisation configuration"),
    ({**NF4, "bnb_4bit_type": "nf4"}, {}, "has no field 'bnb_4bit_type'"),
    ({**NF4, "bnb_4bit_quant_type": 4}, {}, "no quantisation configuration"),
])  # fmt: skip
def test_refusals(opt: Path, quantization: Any, other: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        loaded(opt, quantization, **other)


def test_zero3_refuses_quantised_weights_by_name(opt: Path):
    with pytest.raises(ValueError, match=r"quantised weights.*--trainer.strategy replicated"):
        empty_model(Pretrained(str(opt), adapter=LORA, quantization=NF4), torch.float32, opt)


def test_a_missing_package_is_named(opt: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install mezo-lightning\[quantised\]"):
        loaded(opt, NF4)


def test_a_small_epsilon_is_warned_of():
    with pytest.warns(UserWarning, match=r"epsilon=0.001 is small for a quantised base.* use 0.003 or more"):
        warn_of_small_epsilon(1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_small_epsilon(3e-3)


@pytest.mark.parametrize(("quantization", "tuned"), [
    pytest.param(NF4, ["--model.pretrained.adapter", json.dumps(LORA)], id="4bit-lora"),
    pytest.param(INT8, ["--model.pretrained.adapter", json.dumps(LORA)], id="8bit-lora"),
    pytest.param(NF4, ["--model.pretrained.trainable", "log_scales", "--trainer.precision", "bf16-true"], id="4bit"),
    pytest.param(INT8, ["--model.pretrained.trainable", "log_scales"], id="8bit"),
])  # fmt: skip
def test_tunes_replays_and_exports(
    quantization: Any, tuned: list[str], command: Command, reward_config: Path, tmp_path: Path
):
    words: list[Any] = [*tuned, "--model.pretrained.quantization", json.dumps(quantization), "--trainer.max_steps", 2]
    done = command(
        "fit", "--config", reward_config, "--run_dir", tmp_path / "run", *words, "--trainer.limit_val_batches", 0
    )
    assert done.code is None, done.output
    assert all(record.skipped is None for record in steps_of(tmp_path / "run"))
    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "replayed")
    command("export", "--checkpoint", tmp_path / "run/checkpoints/last.ckpt", "--output", tmp_path / "exported")
    command("replay", "--trajectory", tmp_path / "run", "--output", tmp_path / "base", "--steps", 0)
    files = [tmp_path / name / "model.safetensors" for name in ("replayed", "exported", "base")]
    assert files[0].read_bytes() == files[1].read_bytes() != files[2].read_bytes()


@pytest.mark.parametrize(("quantization", "what"), [
    pytest.param(NF4, {"adapter": LORA}, id="4bit-lora"),
    pytest.param(INT8, {"adapter": LORA}, id="8bit-lora"),
    pytest.param(NF4, {"trainable": "log_scales"}, id="4bit"),
])  # fmt: skip
def test_resumes_on_the_same_base_alone(quantization: Any, what: dict[str, Any], opt: Path, rows: Path, tmp_path: Path):
    def fit(steps: int, folder: str, checkpoint: str | None = None, how: Any = quantization) -> MeZOModule:
        module = MeZOModule(
            Pretrained(str(opt), **what, quantization=how),
            CrossEntropy(),
            optimizer=functools.partial(MeZO, lr=1e-3),
            estimator=CentralDifference(EPSILON),
        )
        trainer = trainer_of(tmp_path / folder, steps)
        trainer.fit(module, data_of(rows), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / folder / "last.ckpt")
        return module

    whole = weights(fit(4, "whole"))
    fit(2, "run")
    resumed = weights(fit(4, "run", str(tmp_path / "run/last.ckpt")))
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match="quantised otherwise"):
        fit(6, "run", str(tmp_path / "run/last.ckpt"), FP4)
