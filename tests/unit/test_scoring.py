import pytest
import torch
from torch import Tensor

from mezo_lightning import scoring
from mezo_lightning.encoding import Encoding
from mezo_lightning.scoring import OptionScorer, Scorer

PROMPTS = ("What did Finn find? Answer:", "A great film. It was", "Ella", "What")
TARGETS = (" a red ball\n", " great", " the old mill by the river\n", " zqx?")


def reference_log_probs(model, tokenizer, prompt: str, target: str) -> Tensor:
    """Log-probabilities of the target's tokens: one row, no padding, all logits, fp64."""
    ids = torch.tensor([tokenizer.encode(prompt + target)])
    number = ids.shape[1] - len(tokenizer.encode(prompt))
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
    return log_probs.gather(-1, ids[0, 1:, None])[-number:, 0]


def test_scores_equal_those_of_each_row_alone(model, tokenizer):
    scores = Scorer(model, Encoding().bind(model, tokenizer))(PROMPTS, TARGETS)
    expected = [reference_log_probs(model, tokenizer, *pair) for pair in zip(PROMPTS, TARGETS, strict=True)]
    assert scores.mean.dtype == torch.float64
    assert scores.tokens.tolist() == [len(log_probs) for log_probs in expected]
    assert scores.tokens.unique().numel() > 1
    torch.testing.assert_close(scores.mean, torch.stack([e.mean() for e in expected]), rtol=1e-5, atol=1e-5)


def test_option_scores_equal_those_of_each_option_alone(model, tokenizer, make_batch):
    batch = make_batch()
    scores = OptionScorer(model, Encoding().bind(model, tokenizer))(batch)
    assert scores.shape == (4, 3)
    for prompt, options, row in zip(batch.prompts, batch.options, scores, strict=True):
        expected = [reference_log_probs(model, tokenizer, prompt, option).mean() for option in options]
        torch.testing.assert_close(row[: len(options)], torch.stack(expected), rtol=1e-5, atol=1e-5)
        assert row[len(options) :].isneginf().all()


def test_chunks_do_not_matter(model, tokenizer, monkeypatch):
    scorer = Scorer(model, Encoding().bind(model, tokenizer))
    whole = scorer(PROMPTS, TARGETS)
    monkeypatch.setattr(scoring, "CHUNK_ELEMENTS", 3 * 320)
    torch.testing.assert_close(scorer(PROMPTS, TARGETS).mean, whole.mean, rtol=1e-6, atol=1e-6)


def test_options_of_one_token_share_the_forward_of_their_prompt_and_no_logits_are_wasted(model, tokenizer, make_batch):
    seen: list[tuple[torch.Size, torch.Size]] = []

    def record(module, args, kwargs, output):
        seen.append((kwargs["input_ids"].shape, output.logits.shape))
        assert output.past_key_values is None

    model.register_forward_hook(record, with_kwargs=True)
    scorer = OptionScorer(model, Encoding().bind(model, tokenizer))
    scorer(make_batch(options=((" a", " the"),) * 4).select([0, 1]))
    [(inputs, logits)] = seen
    assert inputs == (2, max(len(tokenizer.encode(prompt)) for prompt in make_batch().prompts[:2]))
    assert logits == (2, 1, 320)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_give_a_fp32_loss(make_model, tokenizer, dtype):
    model = make_model("opt").to(dtype)
    logits: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda module, args, output: logits.append(output))
    scores = Scorer(model, Encoding().bind(model, tokenizer))(PROMPTS, TARGETS)
    assert logits[0].dtype == dtype
    # What remains is the rounding of the logits; a log-softmax in their dtype would be off by up to 2^-6.
    rows, n = scores.tokens.tolist(), logits[0].shape[1]
    for i, count in enumerate(rows):
        ids = torch.tensor(tokenizer.encode(PROMPTS[i] + TARGETS[i])[-count:])
        expected = logits[0][i, n - count :].double().log_softmax(-1).gather(-1, ids[:, None]).mean()
        assert abs(scores.mean[i] - expected) < 1e-6
