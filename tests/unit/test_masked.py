"""Masked language models: words scored in the place of a mask, by tiny random BERT and RoBERTa."""

from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from mezo_lightning import (
    ChooseOption,
    Copy,
    CrossEntropy,
    Encoding,
    LeafScratch,
    MeZO,
    Point,
    Pretrained,
    RewardObjective,
)
from mezo_lightning.data.batch import Batch
from mezo_lightning.models.pretrained import export
from mezo_lightning.scoring import OptionScorer, scorer_for

CORPUS = ["A great film. It was great. A terrible film, and long. It was terrible. Yes, it was a film! No: a book."] * 9
CONTEXT = 24
PROMPTS = ("A great film. It was [MASK].", "[MASK] film, and it was long: a great book. It was.", "It [MASK]")
WORDS = ("terrible", "A", "was")


def roberta_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE whose mask takes the space before it along, as RoBERTa's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    mask = AddedToken("<mask>", lstrip=True, special=True)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>", mask], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        mask_token=mask,
    )  # fmt: skip


def bert_tokenizer() -> PreTrainedTokenizerBase:
    """Lower-case WordPiece, with BERT's special tokens."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, cls_token="[CLS]", pad_token="[PAD]", sep_token="[SEP]", unk_token="[UNK]",
        mask_token="[MASK]",
    )  # fmt: skip


def masked_model(kind: str) -> PreTrainedModel:
    """A random model of two layers that takes ``CONTEXT`` tokens."""
    shared = {
        "vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "pad_token_id": 1, "initializer_range": 0.2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        if kind == "bert":
            return BertForMaskedLM(BertConfig(**shared, max_position_embeddings=CONTEXT)).eval()
        return RobertaForMaskedLM(RobertaConfig(**shared, max_position_embeddings=CONTEXT + 2)).eval()


KINDS = ("bert", "roberta")
TOKENIZERS = {"bert": bert_tokenizer, "roberta": roberta_tokenizer}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> PreTrainedModel:
    return masked_model(kind)


@pytest.fixture
def tokenizer(kind: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[kind]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each model, with its tokenizer."""
    result = {}
    for kind in KINDS:
        result[kind] = tmp_path_factory.mktemp(kind)
        masked_model(kind).save_pretrained(result[kind])
        TOKENIZERS[kind]().save_pretrained(result[kind])
    return result


def batch_of(**parts) -> Batch:
    rows: dict = {
        "index": (7, 8, 9), "prompts": PROMPTS, "targets": WORDS, "answers": (1, 0, 1), "columns": {},
        "options": (("great", "terrible"), ("A", "I"), ("great", "was")),
    }  # fmt: skip
    return Batch(**(rows | parts))


def reference(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> Tensor:
    """Log-probabilities of all tokens in the mask's place: the text alone, no padding, all logits, fp64."""
    mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
    assert isinstance(mask, str)
    assert isinstance(mask_id, int)
    ids = tokenizer.encode(prompt.replace("[MASK]", mask))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits
    return logits[0, ids.index(mask_id)].double().log_softmax(-1)


def word_id(tokenizer: PreTrainedTokenizerBase, prompt: str, word: str) -> int:
    """The one token of a word that stands in a prompt."""
    mask, mask_id = tokenizer.mask_token, tokenizer.mask_token_id
    assert isinstance(mask, str)
    assert isinstance(mask_id, int)
    masked, filled = (tokenizer.encode(prompt.replace("[MASK]", text)) for text in (mask, word))
    assert len(masked) == len(filled)
    return filled[masked.index(mask_id)]


def test_scores_equal_those_of_each_text_alone(model, tokenizer):
    scores = scorer_for(model, Encoding().bind(model, tokenizer))(PROMPTS, WORDS)
    expected = [reference(model, tokenizer, p)[word_id(tokenizer, p, w)] for p, w in zip(PROMPTS, WORDS, strict=True)]
    assert scores.mean.dtype == torch.float64
    assert scores.tokens.tolist() == [1, 1, 1]
    torch.testing.assert_close(scores.mean, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_row_does_not_depend_on_its_batch(model, tokenizer):
    scorer = OptionScorer(model, Encoding().bind(model, tokenizer))
    together = scorer(batch_of())
    for row in range(3):
        torch.testing.assert_close(scorer(batch_of().select([row]))[0], together[row], rtol=1e-5, atol=1e-5)


def test_the_model_is_as_it_was_after_a_score(model, tokenizer):
    ids = torch.tensor([tokenizer.encode("It was a film")])
    scorer_for(model, Encoding().bind(model, tokenizer))(PROMPTS, WORDS)
    assert model(input_ids=ids).logits.shape == (1, ids.shape[1], 320)


def test_cross_entropy_over_options_and_over_the_vocabulary(model, tokenizer):
    bound = CrossEntropy().bind(model, tokenizer, Encoding())
    batch = batch_of()
    bound.check(batch)
    found = bound.samples(batch, seed=0)
    logs = [reference(model, tokenizer, prompt) for prompt in PROMPTS]
    assert batch.options is not None
    pairs = [
        [row[word_id(tokenizer, p, o)] for o in options]
        for row, p, options in zip(logs, PROMPTS, batch.options, strict=True)
    ]
    scores = torch.tensor(pairs, dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor(batch.answers), reduction="none")
    torch.testing.assert_close(found.values[:, 0], expected, rtol=1e-5, atol=1e-5)
    assert found.metrics["accuracy"].tolist() == (scores.argmax(1) == torch.tensor(batch.answers)).double().tolist()

    plain = bound.samples(batch_of(options=None, answers=None), seed=0)
    expected = torch.stack([-row[word_id(tokenizer, p, w)] for row, p, w in zip(logs, PROMPTS, WORDS, strict=True)])
    torch.testing.assert_close(plain.values[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_accuracy_is_a_reward(model, tokenizer):
    batch = batch_of()
    right = tuple(options[answer] for options, answer in zip(batch.options or (), batch.answers or (), strict=True))
    objective = RewardObjective("rewards.choice.accuracy", completer=ChooseOption())
    bound = objective.bind(model, tokenizer, Encoding())
    found = bound.measure(batch_of(columns={"target": right}), seed=0)
    expected = CrossEntropy().bind(model, tokenizer, Encoding()).samples(batch, seed=0).metrics["accuracy"]
    assert found.values[:, 0].tolist() == (-expected).tolist()


@pytest.mark.parametrize(
    ("prompt", "option", "message"),
    [
        ("A film.", "great", "row 3: the prompt 'A film.' holds no masks: write .MASK. once"),
        ("A [MASK] film. It was [MASK].", "great", "row 3: .* holds 2 masks"),
        (
            "It was [MASK].",
            "great film",
            r"row 3: the option 'great film' must be a single token .* into \[\d+ '.*', \d+",
        ),
        ("It was [MASK].", "zqx", r"row 3: "),
        ("It was [MASK].", " ", "row 3: the option ' ' is empty"),
        ("a film " * CONTEXT + "[MASK]", "great", "row 3: a text of .* tokens does not fit: the limit is 24"),
    ],
)
def test_what_cannot_be_scored_is_refused_by_row(model, tokenizer, prompt: str, option: str, message: str):
    scorer = scorer_for(model, Encoding().bind(model, tokenizer))
    with pytest.raises(ValueError, match=message):
        scorer.check([3], [(prompt, option)])


def test_the_longest_text_is_the_longest_that_the_model_takes(model, tokenizer):
    """RoBERTa's positions begin behind the one for padding: two of its 26 are never used."""
    scorer = scorer_for(model, Encoding().bind(model, tokenizer))
    words = CONTEXT - 4  # beside both special tokens, the mask and "a"
    longest = "a" + " film" * words + " [MASK]"
    assert len(tokenizer.encode(longest.replace("[MASK]", str(tokenizer.mask_token)))) == CONTEXT
    assert torch.isfinite(scorer([longest], ["great"]).mean).all()
    with pytest.raises(ValueError, match="does not fit"):
        scorer.check([0], [(longest + " film", "great")])


def test_options_of_a_causal_model_are_refused(model, tokenizer):
    for encoding in (Encoding(bos_token_id=0), Encoding(truncate=True)):
        with pytest.raises(ValueError, match="is for causal models"):
            CrossEntropy().bind(model, tokenizer, encoding)


def test_a_tokenizer_without_a_mask_is_refused(model, tokenizer):
    tokenizer.mask_token = None
    with pytest.raises(ValueError, match="the tokenizer has no mask token"):
        CrossEntropy().bind(model, tokenizer, Encoding())


def test_generation_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"Generate writes token by token, .*use completer: ChooseOption"):
        RewardObjective("rewards.choice.accuracy").bind(model, tokenizer, Encoding())


def test_both_evaluators_give_the_same_values(model, tokenizer):
    bound = CrossEntropy().bind(model, tokenizer, Encoding())
    space = MeZO(model.named_parameters(), lr=0.0).space
    points = (Point(), Point(((3, 2.0**-5),)), Point(((3, -(2.0**-5)),)))
    ask = partial(bound.samples, batch_of(), seed=0)
    copied, hooked = (evaluator(ask)(points).values for evaluator in (Copy(space), LeafScratch(model, space)))
    assert not torch.equal(copied[0], copied[1])
    torch.testing.assert_close(copied, hooked, rtol=1e-5, atol=1e-5)


def test_a_penalty_for_what_is_written_is_refused():
    lora = {"peft_type": "LORA", "target_modules": ["query"]}
    objective = RewardObjective("rewards.choice.accuracy", completer=ChooseOption(), beta=0.1)
    with pytest.raises(ValueError, match=r"beta=0.1 weighs what is written, and kind='masked' writes nothing"):
        objective.check_model(Pretrained("somewhere", kind="masked", adapter=lora))


# -- where models come from --------------------------------------------------------------------------------------------


def test_it_loads_what_its_user_says_it_is(folders, kind):
    model = Pretrained(str(folders[kind]), kind="masked").load()
    assert type(model).__name__.endswith("ForMaskedLM")
    with pytest.raises(
        ValueError, match=r"kind='causal' does not suit .*ForMaskedLM: .*set model.pretrained.kind: masked"
    ):
        Pretrained(str(folders[kind])).load()


def test_a_causal_model_fills_in_no_masks(make_model, tmp_path):
    make_model("opt").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"kind='masked' does not suit .* a OPTForCausalLM: .*kind: causal"):
        Pretrained(str(tmp_path), kind="masked").load()


def test_lora_is_tuned_and_merged(folders, kind, tmp_path):
    lora = {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]}
    pretrained = Pretrained(str(folders[kind]), kind="masked", adapter=lora)
    model, tokenizer = pretrained.load(), pretrained.load_tokenizer()
    bound = CrossEntropy().bind(model, tokenizer, Encoding())
    before = bound.samples(batch_of(), seed=0).values
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    after = bound.samples(batch_of(), seed=0).values
    assert not torch.allclose(before, after, atol=1e-3)
    export(model, tokenizer, tmp_path / "out")
    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    found = CrossEntropy().bind(merged, tokenizer, Encoding()).samples(batch_of(), seed=0).values
    torch.testing.assert_close(found, after, rtol=1e-4, atol=1e-4)


def test_virtual_tokens_are_refused(folders):
    adapter = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 2}
    with pytest.raises(ValueError, match="PREFIX_TUNING puts virtual tokens in front of causal models only"):
        Pretrained(str(folders["bert"]), kind="masked", adapter=adapter).load()
