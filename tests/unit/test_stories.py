"""The embedded default: the story generator, the pre-training text, and the assets that were built from them."""

from __future__ import annotations

import importlib
import itertools
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "mezo_lightning" / "assets"
QUICKSTART = "Story: {story}\nQuestion: {question}\nAnswer:"


def _example(name: str) -> ModuleType:
    """A script of examples/, which is no package."""
    folder = str(ROOT / "examples")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


stories = _example("stories")
pretraining_text = _example("pretraining_text")
build_embedded = _example("build_embedded")


@pytest.fixture(scope="module")
def sample() -> list[Any]:
    rng = random.Random("test")
    return [stories.tell(rng) for _ in range(3000)]


@pytest.fixture(scope="module")
def base() -> tuple[OPTForCausalLM, Any]:
    model = AutoModelForCausalLM.from_pretrained(ASSETS / "opt-stories").eval()
    return model, AutoTokenizer.from_pretrained(ASSETS / "opt-stories", padding_side="left")


def _rows(split: str) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (ASSETS / "stories" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def _tokens(text: str) -> list[str]:
    words = re.sub(r"[^\w\s]", "", text.lower()).split()
    return [word for word in words if word not in {"a", "an", "the"}]


def _f1(prediction: str, answer: str) -> float:
    ours, theirs = Counter(_tokens(prediction)), Counter(_tokens(answer))
    common = (ours & theirs).total()
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def test_answers_are_spans_and_sentences_contain_them(sample: list[Any]) -> None:
    for story in sample:
        assert len(story.questions) >= 2
        for question in story.questions:
            assert question.answer in story.text
            assert " ".join(_tokens(question.answer)) in " ".join(_tokens(question.sentence))
            assert len(question.sentence.split()) > len(question.answer.split())


def test_each_question_has_one_answer(sample: list[Any]) -> None:
    for story in sample:
        asked = [question.question for question in story.questions]
        assert len(set(asked)) == len(asked), story.text


def test_no_slot_is_left_and_sentences_are_well_formed(sample: list[Any]) -> None:
    for story in sample:
        for text in (story.text, *(question.question for question in story.questions)):
            assert not re.search(r"[{}]|  |Noun|Verb", text)
            assert text[0].isupper()
        assert not re.search(r"[.!?] [a-z]|\ba [aeiou]|\ban [^aeiou]", story.text), story.text


def test_every_beat_is_told_and_every_kind_asked(sample: list[Any]) -> None:
    kinds = Counter(question.kind for story in sample for question in story.questions)
    grammar = _example("story_grammar")
    beats = [*grammar.OPENINGS_ALONE, *grammar.OPENINGS_TOGETHER, *grammar.ARRIVALS, *grammar.EVENTS, *grammar.ENDINGS]
    assert set(kinds) == {ask.kind for beat in beats for ask in beat.asks}
    assert min(kinds.values()) > 100


def test_streams_are_seeded_and_leave_stories_out() -> None:
    first = [story for story, _ in zip(stories.stories("s"), range(50), strict=False)]
    again = [story for story, _ in zip(stories.stories("s"), range(50), strict=False)]
    other = [story for story, _ in zip(stories.stories("t"), range(50), strict=False)]
    assert first == again
    assert first != other
    excluded = frozenset({first[3].text})
    without = [story for story, _ in zip(stories.stories("s", excluded), range(49), strict=False)]
    assert without == first[:3] + first[4:]


def test_splits_share_no_story() -> None:
    rows = stories.splits(7, {"train": 300, "validation": 100, "test": 100})
    texts = [row["story"] for split in rows.values() for row in split]
    assert len(set(texts)) == len(texts) == 496  # of 500 stories: four leave nothing to ask about


def test_pretraining_never_shows_the_quickstart_form() -> None:
    held_out = frozenset(row["story"] for row in stories.splits(0, {"test": 50})["test"])
    texts = [text for text, _ in zip(pretraining_text.question_documents(0, held_out), range(3000), strict=False)]
    for text in texts:
        assert not re.search(r"\b(Story|Question|Answer)\b", text)
        assert not any(story in text for story in held_out)


def test_both_answer_styles_occur_and_the_bare_one_is_rarer(sample: list[Any]) -> None:
    rng = random.Random(0)
    bare = 0
    for story in sample[:1000]:
        text = pretraining_text.questions_document(story, rng)
        bare += not any(question.sentence in text.removeprefix(story.text) for question in story.questions)
    assert 100 < bare < 450


def test_repetitions_repeat_and_only_copies_are_learned(base: tuple[OPTForCausalLM, Any]) -> None:
    rows = build_embedded.Rows(base[1], 0, frozenset())
    ids, labels = rows.batch(300, 1.0)
    for row, targets in zip(ids.tolist(), labels.tolist(), strict=True):
        length = targets.index(next(label for label in targets if label != build_embedded.IGNORED)) - 1
        assert row[1 : 1 + length] == row[1 + length : 1 + 2 * length]
        assert targets[1 + length : 1 + 2 * length] == row[1 + length : 1 + 2 * length]


def test_shipped_data_is_what_the_script_writes() -> None:
    assert stories.splits(0, build_embedded.SIZES) == {name: _rows(name) for name in build_embedded.SIZES}


def test_shipped_model_is_a_small_opt_with_its_tokenizer(base: tuple[OPTForCausalLM, Any]) -> None:
    model, tokenizer = base
    assert isinstance(model, OPTForCausalLM)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenizer("Mia")["input_ids"][0] == tokenizer.bos_token_id
    text = "Zoë said: “4 ÷ 4 = 1”\n\tand left.\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert sum(path.stat().st_size for path in (ASSETS / "opt-stories").iterdir()) < 7e6


def test_shipped_prompts_fit_the_context(base: tuple[OPTForCausalLM, Any]) -> None:
    _, tokenizer = base
    prompts = [QUICKSTART.format(**row) for split in build_embedded.SIZES for row in _rows(split)]
    longest = max(len(ids) for ids in tokenizer(prompts)["input_ids"])
    assert longest + 24 <= build_embedded.ROW


@pytest.mark.parametrize(
    ("template", "lowest", "highest"),
    [("Tale: {story}\nAsk: {question}\nReply:", 0.25, 0.75), (QUICKSTART, 0.25, 0.6)],
)
def test_shipped_model_answers_held_out_questions_in_sentences(
    base: tuple[OPTForCausalLM, Any], template: str, lowest: float, highest: float
) -> None:
    """The answer is there, the style is wrong: what the quickstart's reward has to change."""
    model, tokenizer = base
    rows = _rows("test")[:64]
    inputs = tokenizer([template.format(**row) for row in rows], return_tensors="pt", padding=True)
    newline = tokenizer.encode("\n", add_special_tokens=False)[0]
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=[newline, 2], pad_token_id=1)
    texts = [text.split("\n")[0] for text in tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])]
    found = [row["answers"][0].lower() in text.lower() for row, text in zip(rows, texts, strict=True)]
    scores = [_f1(text, row["answers"][0]) for row, text in zip(rows, texts, strict=True)]
    assert sum(found) / len(found) > 0.7
    assert lowest < sum(scores) / len(scores) < highest


@pytest.mark.slow
def test_building_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = build_embedded.question_documents
    monkeypatch.setattr(build_embedded, "question_documents", lambda *which: itertools.islice(documents(*which), 1500))
    monkeypatch.setattr(build_embedded, "SIZES", {"train": 200, "validation": 50, "test": 50})
    monkeypatch.setattr(build_embedded, "BATCH", 2)
    threads = torch.get_num_threads()
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in [*folders, folders[1]]:  # the last one over an existing build
        build_embedded.build(folder, seed=3, steps=2, threads=1)
    torch.set_num_threads(threads)
    files = sorted(path.relative_to(folders[0]) for path in folders[0].rglob("*") if path.is_file())
    assert len(files) >= 7
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file
