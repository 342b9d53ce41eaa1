"""The penalty for leaving the base model, against plain torch, and what it is refused for."""

import copy
import signal

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from mezo_lightning.completers import ChooseOption, Completer, Completions
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import CentralDifference
from mezo_lightning.evaluators import Copy
from mezo_lightning.generation import Generate
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.objectives import RewardObjective
from mezo_lightning.objectives.divergence import Divergence, without_adapter
from mezo_lightning.optimizer import MeZO
from mezo_lightning.steps import Point

TARGETS = {"opt": ["q_proj", "v_proj"], "llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def length(completions, **columns):
    return [float(len(text)) for text in completions]


def mostly_unsure(completions, **columns):
    return [None, 1.0, 2.0, float("nan")]


def adapted(make_model, kind="llama", *, moved=0.3, **settings) -> PeftModel:
    """A tiny model with LoRA on it; unless ``moved`` is 0, the adapter changes what the model says."""
    usual = {"peft_type": "LORA", "r": 2, "target_modules": TARGETS[kind], "fan_in_fan_out": kind == "gpt2"}
    model = Pretrained("unused", adapter=usual | settings).adapt(make_model(kind))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = moved * torch.randn(parameter.shape, generator=generator)
    assert isinstance(model, PeftModel)
    return model


SIX_TOKENS: Completer = Generate(max_new_tokens=6)


def bound(model, tokenizer, *, encoding=Encoding(), completer: Completer = SIX_TOKENS, reward=length, **settings):  # noqa: B008
    return RewardObjective(reward, completer=completer, **settings).bind(model, tokenizer, encoding)


def by_hand(model, base, prompt, completion, estimator="k3"):
    """Mean over the completion's tokens, one row at a time, without padding and in fp64."""
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        tuned, other = (
            m(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            for m in (model, base)
        )
    ratio = (tuned - other)[-len(completion) :]
    return float((ratio if estimator == "k1" else (-ratio).exp() - 1 + ratio).mean())


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_it_is_what_plain_torch_says(make_model, tokenizer, make_batch, kind, estimator):
    model, base = adapted(make_model, kind), make_model(kind)
    batch, encoder = make_batch(), Encoding().bind(model, tokenizer)
    said = Generate(max_new_tokens=6).bind(model, encoder).complete(batch, seed=0)
    found = Divergence(model, encoder, beta=1.0, estimator=estimator)(batch.prompts, said)
    prompts = [encoder.prompt(prompt) for prompt in batch.prompts]
    expected = [by_hand(model, base, *row, estimator) for row in zip(prompts, said.ids, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert found.dtype == torch.float64
    assert max(map(abs, expected)) > 0.01
    assert estimator == "k1" or min(expected) >= 0


def test_it_is_a_component_of_the_objective_and_no_part_of_the_reward(make_model, tokenizer, make_batch):
    model, batch = adapted(make_model), make_batch()
    plain, penalised = bound(model, tokenizer), bound(model, tokenizer, beta=0.5)
    without, with_it = (objective.samples(batch, seed=0) for objective in (plain, penalised))
    assert "kl" not in without.metrics
    assert with_it.metrics["kl"].min() > 0
    assert torch.equal(with_it.metrics["reward"], without.metrics["reward"])
    assert torch.equal(with_it.values[:, :1], without.values)
    assert torch.equal(with_it.values[:, 1], 0.5 * with_it.metrics["kl"])
    assert with_it.valid.all()
    assert torch.equal(penalised.startup(batch).values, with_it.values)


def test_a_sample_without_a_reward_does_not_count_through_its_penalty(make_model, tokenizer, make_batch):
    objective = bound(adapted(make_model), tokenizer, reward=mostly_unsure, beta=1.0, on_failure="mask")
    samples = objective.samples(make_batch(), seed=0)
    assert samples.valid.tolist() == [[False] * 2, [True] * 2, [True] * 2, [False] * 2]
    assert samples.values.isfinite().all()


def test_it_is_zero_before_an_adapter_has_learned_anything(make_model, tokenizer, make_batch):
    samples = bound(adapted(make_model, moved=0.0), tokenizer, beta=1.0).samples(make_batch(), seed=0)
    assert samples.metrics["kl"].tolist() == [0.0] * 4


def test_at_a_probe_the_tuned_model_is_the_probes_and_the_base_stays(make_model, tokenizer, make_batch):
    model, batch = adapted(make_model, moved=0.0), make_batch()
    objective = bound(model, tokenizer, completer=ChooseOption(), beta=1.0)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    space = MeZO(trainable, lr=1e-3).space
    points = [Point(), Point(((5, 0.3),)), Point(((5, -0.3),))]
    evaluation = Copy(space)(lambda: objective.samples(batch, seed=0))(points)
    encoder, base = Encoding().bind(model, tokenizer), make_model("llama")
    for point, samples in zip(points, evaluation.samples, strict=True):
        there = copy.deepcopy(model)
        space_there = MeZO([(n, p) for n, p in there.named_parameters() if p.requires_grad], lr=1e-3).space
        space_there.move_to(point, space_there.save())
        texts = [f" {text}" for text in samples.completions or ()]
        rows = [encoder.continued(*row) for row in zip(batch.prompts, texts, strict=True)]
        expected = [by_hand(there, base, row.ids[: -row.target_length], row.target_ids) for row in rows]
        assert samples.metrics["kl"].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert (max(expected) > 1e-3) == bool(point.terms)


@pytest.mark.slow
def test_steps_with_a_large_weight_lead_back_to_the_base(make_model, tokenizer, make_batch):
    """The rewards are lengths; a weight of 1e-9 measures and changes nothing."""
    distances = {}
    for beta in (1e-9, 30.0):
        model = adapted(make_model)
        objective = bound(model, tokenizer, beta=beta)
        optimizer = MeZO([(name, p) for name, p in model.named_parameters() if p.requires_grad], lr=3e-4)
        evaluate = Copy(optimizer.space)(lambda objective=objective: objective.samples(make_batch(), seed=0))
        for step in range(8):
            optimizer.step(estimate=CentralDifference(0.03, num_queries=4).estimate(evaluate, seed=step))
        distances[beta] = float(objective.samples(make_batch(), seed=0).metrics["kl"].mean())
    assert distances[30.0] < 0.8 * distances[1e-9]  # 0.52 and 1.01, from 0.87


def test_prompts_that_are_cut_leave_the_room_that_they_left_when_completed(make_model, tokenizer, make_batch):
    model, encoding = adapted(make_model), Encoding(max_length=20, truncate=True)
    samples = bound(model, tokenizer, encoding=encoding, beta=1.0).samples(make_batch(), seed=0)
    encoder, base = encoding.bind(model, tokenizer), make_model("llama")
    said = Generate(max_new_tokens=6).bind(model, encoder).complete(make_batch(), seed=0)
    prompts = [encoder.prompt(prompt, reserve=6) for prompt in make_batch().prompts]
    expected = [by_hand(model, base, *row) for row in zip(prompts, said.ids, strict=True)]
    assert samples.metrics["kl"].tolist() == pytest.approx(expected, rel=1e-4)


def test_switching_off_leaves_no_trace(make_model):
    settings = {"peft_type": "LORA", "target_modules": ["q_proj"]}
    model = Pretrained("unused", adapter=settings, trainable="lora_B").adapt(make_model("llama"))
    assert isinstance(model, PeftModel)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers
    with without_adapter(model):
        assert all(layer.disable_adapters for layer in layers)
    with pytest.raises(KeyboardInterrupt), without_adapter(model):
        signal.raise_signal(signal.SIGINT)
    assert all(not layer.disable_adapters for layer in layers)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {n for n in before if "lora_B" in n}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # between PEFT and transformers
def test_what_has_no_base_is_refused(make_model, tokenizer):
    with pytest.raises(ValueError, match=r"beta=0\.1 needs the base model .* tuning the model itself overwrites it"):
        bound(make_model("opt"), tokenizer, beta=0.1)
    with pytest.raises(ValueError, match=r"tuning 17 of its own weights \(base_model\.model.*bias.* overwrites"):
        bound(adapted(make_model, "opt", bias="all", moved=0.0), tokenizer, beta=0.1)
    virtual = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match=r"beta=0\.1 .* PROMPT_TUNING adds virtual tokens: use LORA"):
        bound(get_peft_model(make_model("llama"), virtual), tokenizer, beta=0.1)
    unfrozen = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    next(p for name, p in unfrozen.named_parameters() if "embed_tokens" in name).requires_grad_(True)
    with pytest.raises(ValueError, match=r"tuning 1 of its own weights .*embed_tokens"):
        bound(unfrozen, tokenizer, beta=0.1)


def test_layers_that_are_trained_as_copies_leave_the_base_alone(make_model, tokenizer, make_batch):
    model = adapted(make_model, "gpt2", moved=0.0, modules_to_save=["ln_f"])
    [name] = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith("ln_f.modules_to_save.default.weight")]  # fmt: skip  # noqa: E501
    objective = bound(model, tokenizer, beta=1.0)
    assert objective.samples(make_batch(), seed=0).metrics["kl"].tolist() == [0.0] * 4
    model.get_parameter(name).data.mul_(1.5)
    assert objective.samples(make_batch(), seed=0).metrics["kl"].min() > 0


def test_settings_are_refused_before_any_model_is_loaded():
    for beta in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"beta={beta} must be"):
            RewardObjective(length, beta=beta)
    with pytest.raises(ValueError, match="kl_estimator='k2'"):
        RewardObjective(length, kl_estimator="k2")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"beta=0\.1 .*set beta: 0"):
        RewardObjective(length, beta=0.1).check_model(Pretrained("/no/model"))
    RewardObjective(length).check_model(Pretrained("/no/model"))
    assert RewardObjective(length, completer=ChooseOption(), beta=0.1).autoregressive, "LeafScratch cannot serve it"


def test_an_empty_completion_is_the_token_that_ended_it(make_model, tokenizer):
    model = adapted(make_model)
    encoder = Encoding().bind(model, tokenizer)
    found = Divergence(model, encoder, beta=1.0, estimator="k3")(["What"], Completions(("",), ((2,),), ("stop",)))
    assert found.tolist() == pytest.approx(
        [by_hand(model, make_model("llama"), encoder.prompt("What"), (2,))], rel=1e-4
    )
