"""The scales of quantised weights as parameters: what layers compute with, and what becomes of them in an export."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from mezo_lightning.estimators import GRZO, CentralDifference
from mezo_lightning.evaluators import Copy
from mezo_lightning.flipout import Flipout
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.models.pretrained import Pretrained, export
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rowwise.evaluator import Rowwise
from mezo_lightning.samplers import Gaussian, derive_seed
from mezo_lightning.steps import Point
from mezo_lightning.transforms import Clip

bnb: Any = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantised)")

NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"quant_method": "bitsandbytes", "load_in_8bit": True}
BITS = [pytest.param(NF4, id="4bit"), pytest.param(INT8, id="8bit")]
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}


def loaded(folder: Path, quantization: dict[str, Any], dtype: torch.dtype = torch.float32, **other: Any) -> Any:
    options: dict[str, Any] = {"trainable": "log_scales", **other}
    return Pretrained(str(folder), quantization=quantization, **options).load(dtype)


def tuned(folder: Path, quantization: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model whose scales are 10 % away from those of its base."""
    model = loaded(folder, quantization, dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    return model


def weight_of(layer: Any, factors: Tensor | None = None) -> Tensor:
    """The weight that a layer's codes stand for, its scales multiplied by some factors."""
    if isinstance(layer, bnb.nn.Linear4bit):
        weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    else:
        weight = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.scales)
    return weight if factors is None else (weight.view(len(factors), -1) * factors[:, None]).view_as(weight)


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([[0, 60, 70, 80, 90, 100]])).logits


def error(found: Tensor, expected: Tensor) -> float:
    """Root mean square, in units of what was expected."""
    return float((found.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("quantization", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_computes_with_its_tuned_scales(opt: Path, quantization: dict[str, Any], dtype: torch.dtype):
    model = tuned(opt, quantization, dtype)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 6 * model.config.num_hidden_layers
    assert all(name.endswith(".log_scales") and p.dtype == dtype for name, p in trainable.items())
    layer = model.model.decoder.layers[0].fc1
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(2)).to(dtype)
    bias = layer.bias.float()
    with torch.inference_mode():
        tolerance = 1e-5 if (quantization, dtype) == (NF4, torch.float32) else 2e-2  # 8-bit layers round their inputs
        expected = F.linear(x.float(), weight_of(layer, layer.log_scales.float().exp()), bias)
        assert error(layer(x), expected) < tolerance
        assert error(layer(x), F.linear(x.float(), weight_of(layer), bias)) > 4e-2


@pytest.mark.parametrize("quantization", BITS)
def test_it_starts_as_the_base(opt: Path, quantization: dict[str, Any]):
    model = loaded(opt, quantization)
    torch.testing.assert_close(logits(model), logits(loaded(opt, quantization, trainable="layer_norm")))


@pytest.mark.parametrize("quantization", BITS)
def test_both_evaluators_probe_alike_and_leave_no_trace(opt: Path, quantization: dict[str, Any]):
    model = tuned(opt, quantization)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    space = MeZO(model.named_parameters()).space
    outputs = []
    for evaluator in (Copy(space), LeafScratch(model, space)):
        evaluate = evaluator(lambda: outputs.append(logits(model).clone()) or torch.zeros(()))
        evaluate([Point(), Point(((3, 0.125),))])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


IDS = torch.tensor([[0, 60, 70, 80, 90, 100], [0, 61, 72, 83, 94, 105]])


def next_token_loss(model: Any) -> Tensor:
    with torch.inference_mode():
        return F.cross_entropy(model(input_ids=IDS).logits[:, :-1].flatten(0, 1).double(), IDS[:, 1:].flatten())


def test_steps_are_those_of_qzo_in_log_scales_on_the_weights_that_the_codes_stand_for(opt: Path):
    """The published algorithm, two-sided and clipped, on a dense model, but for the scales: they are multiplied."""
    lr, epsilon, most = 0.05, 0.125, 1.0
    model = loaded(opt, NF4)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit)}
    dense = AutoModelForCausalLM.from_pretrained(opt, dtype=torch.float32).eval()
    starts = [0, *torch.tensor([layer.log_scales.numel() for layer in layers.values()]).cumsum(0).tolist()]
    log_scales = torch.zeros(starts.pop())

    def loss(at: Tensor) -> float:
        for start, (name, layer) in zip(starts, layers.items(), strict=True):
            factors = at[start : start + layer.log_scales.numel()].exp()
            dense.get_submodule(name).weight.data = weight_of(layer, factors)
        return float(next_token_loss(dense))

    optimizer = MeZO(model.named_parameters(), lr=lr)
    estimator, evaluator = CentralDifference(epsilon), Copy(optimizer.space)
    clipped = 0
    for step in range(4):
        z = Gaussian().fill(torch.empty(log_scales.numel()), derive_seed(step, 0), 0)
        slope = (loss(log_scales + epsilon * z) - loss(log_scales - epsilon * z)) / (2 * epsilon)
        clipped += abs(slope) > most
        log_scales -= lr * max(-most, min(slope, most)) * z
        optimizer.step(estimate=Clip(most)(estimator.estimate(evaluator(lambda: next_token_loss(model)), seed=step)))
        tuned_scales = torch.cat([layer.log_scales.detach() for layer in layers.values()])
        torch.testing.assert_close(tuned_scales, log_scales, atol=2e-4, rtol=0)
    assert 0 < clipped < 4


@pytest.mark.parametrize("kind", ["opt", "llama"])
@pytest.mark.parametrize("quantization", BITS)
def test_an_export_has_the_tuned_scales_and_the_same_codes(
    folders: dict[str, Path], tokenizer: Any, tmp_path: Path, kind: str, quantization: dict[str, Any]
):
    model = tuned(folders[kind], quantization)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    export(model, tokenizer, tmp_path / "out")
    assert "quantization_config" in json.loads((tmp_path / "out" / "config.json").read_text())
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not any("log_scales" in name for name in opened.state_dict())
    torch.testing.assert_close(logits(opened), expected, rtol=1e-3, atol=1e-3)
    codes = [name for name, p in opened.named_parameters() if not p.is_floating_point()]
    assert codes
    assert all(torch.equal(opened.get_parameter(name), before[name]) for name in codes)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_some_layers_beside_dense_weights_may_be_tuned(opt: Path):
    model = loaded(opt, NF4, trainable=r"layers.0\..*fc1\.log_scales|layer_norm")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert sum("log_scales" in name for name in names) == 1
    assert len(names) > 1


@pytest.mark.parametrize(("quantization", "other", "message"), [
    ({**NF4, "bnb_4bit_use_double_quant": True}, {}, "bnb_4bit_use_double_quant quantises scales as well"),
    (NF4, {"adapter": LORA}, "trainable='log_scales' fits no parameter's name"),
    (NF4, {"trainable": "q_proj"}, "quantised weights cannot be perturbed; their scales can, trainable: log_scales"),
    (NF4, {"trainable": "("}, r"trainable='\(' is no regular expression"),
])  # fmt: skip
def test_refusals(opt: Path, quantization: dict[str, Any], other: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        loaded(opt, quantization, **other)


def test_rows_cannot_have_scales_of_their_own(opt: Path):
    model = loaded(opt, NF4)
    space = MeZO(model.named_parameters(), sampler=Flipout()).space
    evaluate = Rowwise(model, space, Copy(space))(lambda: logits(model).mean((1, 2)))
    with pytest.raises(ValueError, match=r"log_scales' is used in .*: rows cannot have directions of their own there"):
        GRZO(0.1).estimate(evaluate, seed=1)
