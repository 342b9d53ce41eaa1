import pytest
import torch
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from mezo_lightning.encoding import Encoder, Encoding
from mezo_lightning.scoring import Scorer

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def bound(tokenizer, context=None, **fields) -> Encoder:
    return Encoder(Encoding(**fields), tokenizer, context)


def test_prompt_is_what_the_tokenizer_makes_of_it(tokenizer):
    text = "Story: Finn found a ball.\nAnswer:"
    assert bound(tokenizer).prompt(text) == tuple(tokenizer.encode(text))
    assert bound(tokenizer).prompt(text)[0] == 0


def test_bos_token_id_replaces_the_default(tokenizer):
    text = "It was"
    bare = tuple(tokenizer.encode(text, add_special_tokens=False))
    assert bound(tokenizer, bos_token_id=2).prompt(text) == (2, *bare)


def test_nothing_is_appended_where_the_tokenizer_ends_its_texts(tokenizer, tokenizer_file):
    ending = type(tokenizer_file).from_str(tokenizer_file.to_str())
    ending.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    other = PreTrainedTokenizerFast(tokenizer_object=ending, bos_token="<s>", pad_token="<pad>", eos_token="</s>")
    assert other.encode("It was")[-1] == 2
    assert bound(other).prompt("It was") == bound(tokenizer).prompt("It was")


def test_target_length_follows_mezo(tokenizer):
    prompt, target = "A great film. It was", " great"
    text = bound(tokenizer).continued(prompt, target)
    full = tokenizer.encode(prompt + target)
    assert text.ids == tuple(full)
    assert text.target_length == len(full) - len(tokenizer.encode(prompt))
    assert tokenizer.decode(text.target_ids) == target


def test_left_padding(tokenizer):
    rows = [(0, 5, 6, 7), (0, 9)]
    batch = bound(tokenizer).pad(rows, torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[0, 5, 6, 7], [1, 1, 0, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


def test_too_long_is_an_error_that_names_row_and_limits(tokenizer):
    encoder = bound(tokenizer, context=24, max_length=2048)
    encoder.check([3], [("It was", " great")])
    with pytest.raises(ValueError, match=r"row 17: .*limit is 24 tokens .*max_length=2048.*context of 24.*truncate"):
        encoder.check([3, 17], [("It was", " great"), ("zq" * 20, " great")])
    prompt = "It was a red ball"
    length = len(encoder.prompt(prompt))
    assert len(encoder.prompt(prompt, reserve=24 - length)) == length
    with pytest.raises(ValueError, match="does not fit"):
        encoder.prompt(prompt, reserve=25 - length)
    with pytest.raises(ValueError, match="leave no room"):
        encoder.prompt(prompt, reserve=24)


def test_truncation_keeps_the_start_token_and_the_end(tokenizer):
    encoder = bound(tokenizer, context=24, truncate=True)
    prompt = "Ella came from the old mill. " * 4 + "It was"
    whole = bound(tokenizer).continued(prompt, " great")
    cut = encoder.continued(prompt, " great")
    assert len(cut.ids) == 24
    assert cut.ids == (0, *whole.ids[-23:])
    assert cut.target_ids == whole.target_ids
    assert len(encoder.prompt(prompt, reserve=10)) == 14


def test_a_target_needs_tokens_of_its_own_and_something_before_it(tokenizer):
    with pytest.raises(ValueError, match="adds no token"):
        bound(tokenizer).continued("It was", "")
    tokenizer_without_bos = PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        pad_token="<pad>",
    )
    tokenizer_without_bos.backend_tokenizer.post_processor = processors.Sequence([])
    encoder = bound(tokenizer_without_bos)
    with pytest.raises(ValueError, match="empty"):
        encoder.prompt("")
    with pytest.raises(ValueError, match="nothing precedes"):
        encoder.continued("", "a")
    text = encoder.continued("", "ab cd")
    assert text.target_length == len(text.ids) - 1


def test_chat_template_without_doubled_special_tokens(tokenizer):
    tokenizer.chat_template = CHAT
    encoder = bound(tokenizer, chat=True, system="Be short.")
    ids = encoder.prompt("What?")
    assert tokenizer.decode(ids) == "<s>[system]Be short.[user]What?[assistant]"
    assert ids.count(0) == 1
    text = encoder.continued("What?", " a ball</s>")
    assert tokenizer.decode(text.target_ids) == " a ball</s>"
    assert text.ids[-1] == 2


def test_settings_that_would_be_ignored_are_refused(tokenizer):
    with pytest.raises(ValueError, match="chat template"):
        bound(tokenizer, chat=True)
    for fields in ({"system": "x"}, {"chat": True, "bos_token_id": 0}, {"chat": True, "truncate": True}):
        with pytest.raises(ValueError, match=next(iter(fields)) if len(fields) == 1 else "chat|truncate"):
            Encoding(**fields)
    with pytest.raises(ValueError, match="max_length=1"):
        Encoding(max_length=1)


def test_the_context_is_the_models(model, tokenizer):
    encoder = Encoding().bind(model, tokenizer)
    assert encoder.limit == 96
    assert Encoding(max_length=50).bind(model, tokenizer).limit == 50
    with pytest.raises(ValueError, match="bos_token_id=320"):
        Encoding(bos_token_id=320).bind(model, tokenizer)
    longest = "zq" * 47  # 94 tokens, <s> in front, one to follow
    assert len(encoder.continued(longest, "z").ids) == 96
    assert torch.isfinite(Scorer(model, encoder)([longest], ["z"]).mean).all()
    with pytest.raises(ValueError, match="context of 96"):
        encoder.continued(longest, "zq")
