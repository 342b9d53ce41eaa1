"""A tiny model of each kind and a file of rows, saved once; and a command line whose parser is quick to build."""

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import docstring_parser
import pytest
import reward_examples
import torch
import transformers
from helpers import Command, mezo, parse_docstrings_once, write_config, write_reward_config
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerFast

ROWS = 24


@pytest.fixture(scope="session")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_file: Tokenizer, make_model: Callable[..., PreTrainedModel]
) -> dict[str, Path]:
    """Folders of a tiny "opt", "gpt2" and "llama", and of another "opt" of the same shape, "opt2"."""
    transformers.utils.logging.disable_progress_bar()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer_file, bos_token="<s>", pad_token="<pad>", eos_token="</s>"
    )
    result = {}
    for name in ("opt", "gpt2", "llama", "opt2"):
        result[name] = tmp_path_factory.mktemp(name)
        make_model(name.removesuffix("2") if name == "opt2" else name, seed=len(result)).save_pretrained(result[name])
        tokenizer.save_pretrained(result[name])
    return result


@pytest.fixture(scope="session")
def opt(folders: dict[str, Path]) -> Path:
    return folders["opt"]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with answers, and with a label of two."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    places = ["mill", "river", "garden", "old mill by the river"]
    lines = [
        {"question": f"Where is {i}?", "answer": f" the {places[i % 4]}", "label": i % 2, "answers": [places[i % 4]]}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No counts, signal handlers or threads of an earlier run."""
    reward_examples.calls = 0
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(1)  # the launcher of `ddp` takes all cores


@pytest.fixture(scope="session", autouse=True)
def _docstrings_parsed_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docstring_parser, "parse_from_object", docstring_parser.parse_from_object)  # undone at the end
        parse_docstrings_once()
        yield


@pytest.fixture
def loss_config(tmp_path: Path, opt: Path, rows: Path) -> Path:
    """A configuration that tunes by loss, two steps between validations."""
    return write_config(tmp_path / "loss.yaml", opt, rows, {"class_path": "CrossEntropy"})


@pytest.fixture
def reward_config(tmp_path: Path, opt: Path, rows: Path) -> Path:
    """A configuration that tunes by reward."""
    return write_reward_config(tmp_path / "reward.yaml", opt, rows)


@pytest.fixture
def command() -> Command:
    return mezo
