"""Fixtures that any test may use: tiny random models and a tiny tokenizer, made here, nothing downloaded.

What is large is imported where it is used: xdist's first process, which runs no test, reads this file as well, and its
workers start only then.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from mezo_lightning.data.batch import Batch

# Imports and collected tests are a million objects that live until the end: looking for garbage among them took a fifth
# of the time before the first test.
gc.disable()
# A shell starts what runs in its background with Ctrl-C ignored, and tests would wait for it in vain.
signal.signal(signal.SIGINT, signal.default_int_handler)

SPECIAL = ["<s>", "<pad>", "</s>"]  # ids 0, 1, 2, as OPT has them
CORPUS = [
    "Story: Finn found a red ball in the garden.\nQuestion: What did Finn find?\nAnswer: a red ball\n",
    "Story: Ella came from the old mill by the river.\nQuestion: Where did Ella come from?\nAnswer: the old mill\n",
    "A great film. It was great. A terrible film. It was terrible.\n\n",
]


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run, they run on one thread; xdist's first process hands them on to its workers."""
    if config.getoption("dist", "no") == "no":
        import torch

        torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """From here on garbage is looked for again, among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def ctrl_c_is_left_as_it_was() -> Iterator[None]:
    """A handler that stays behind would swallow the Ctrl-C of a later test."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture(scope="session")
def tokenizer_file() -> Tokenizer:
    """Byte-level BPE of 320 entries that puts <s> in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


@pytest.fixture
def tokenizer(tokenizer_file: Tokenizer) -> PreTrainedTokenizerBase:
    """The tiny tokenizer as transformers sees it, set up as `Pretrained.load_tokenizer` does."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_file, bos_token="<s>", pad_token="<pad>", eos_token="</s>", padding_side="left"
    )


ModelFactory = Callable[..., "PreTrainedModel"]


def tiny_model(kind: str, *, seed: int = 0, context: int = 96, vocabulary: int = 320) -> PreTrainedModel:
    """A random model of two layers; its weights are large enough to make it write different things."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    shared = {"vocab_size": vocabulary, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    shared |= {"initializer_range" if kind != "opt" else "init_std": 0.2}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        match kind:
            case "opt":
                config = OPTConfig(
                    **shared, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2,
                    ffn_dim=64, max_position_embeddings=context,
                )  # fmt: skip
                return OPTForCausalLM(config).eval()
            case "gpt2":
                return GPT2LMHeadModel(GPT2Config(**shared, n_embd=32, n_layer=2, n_head=2, n_positions=context)).eval()
            case "llama":
                config = LlamaConfig(
                    **shared, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                    intermediate_size=64, max_position_embeddings=context, tie_word_embeddings=True,
                )  # fmt: skip
                return LlamaForCausalLM(config).eval()
    raise AssertionError(kind)


@pytest.fixture(scope="session")
def make_model() -> ModelFactory:
    """`make_model(kind, seed=0, context=96)` builds a fresh tiny "opt", "gpt2" or "llama"."""
    return tiny_model


@pytest.fixture(params=["opt", "gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each tiny architecture in turn."""
    return tiny_model(request.param)


def small_batch(**parts) -> Batch:
    """Four rows with targets and options of unequal lengths; any part, or further columns, may be given."""
    from mezo_lightning.data.batch import Batch

    rows: dict = {
        "prompts": (
            "Story: Finn found a red ball in the garden.\nQuestion: What did Finn find?\nAnswer:",
            "A great film. It was",
            "Ella came from the old mill. Where did Ella come from?\nAnswer:",
            "What",
        ),
        "targets": (" a red ball\n", " great", " the old mill by the river\n", " zqx?"),
        "options": ((" a red ball", " the mill", " it"), (" great", " terrible"), (" a", " it"), (" it", " b", " zqx")),
        "answers": (0, 1, 0, 1),
        "index": (100, 101, 102, 103),
        "columns": {},
    }  # fmt: skip
    return Batch(**(rows | parts))


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """`make_batch(**parts)` builds a batch of four rows; parts are those of `Batch`."""
    return small_batch
