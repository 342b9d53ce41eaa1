"""Answers are received once: what counts as the same question, and several processes that share a file."""

import datetime
import multiprocessing
import sqlite3
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mezo_lightning.rewarding import memory as reward_memory
from mezo_lightning.rewarding.memory import Answer, Memory, question


def asked(told: Any, identity: str = "judge") -> bytes:
    found = question(identity, told)
    assert found is not None
    return found


A, B, C = (asked({"completion": text}) for text in "abc")


def test_the_same_question_is_the_same_whatever_the_order() -> None:
    assert asked({"prompt": "p", "completion": "a"}) == asked({"completion": "a", "prompt": "p"})
    assert asked({"x": ("a", 1)}) == asked({"x": ["a", 1]})
    day = datetime.date(2026, 1, 1)
    assert asked({"x": day, "y": np.arange(3)}) == asked({"x": datetime.date(2026, 1, 1), "y": np.arange(3)})


def test_everything_that_is_told_makes_a_difference() -> None:
    different = [
        {"completion": "a"}, {"completion": "b"}, {"prompt": "a"}, {"completion": "a", "gold": None},
        {"completion": "a", "gold": "x"}, {"completion": "a", "gold": 1}, {"completion": "a", "gold": True},
        {"completion": "a", "gold": 1.0}, {"completion": ["a"]}, {"completion": "\ud800"},
        {"gold": datetime.date(2026, 1, 1)}, {"gold": np.arange(3)}, {"gold": np.arange(3.0)}, {},
    ]  # fmt: skip
    assert len({asked(told) for told in different}) == len(different)
    assert asked({}, "judge") != asked({}, "judge@2")


def test_what_has_no_content_is_no_question() -> None:
    assert question("judge", {"x": lambda: 1}) is None
    assert question("judge", {"x": threading.Lock()}) is None
    nested: list[Any] = []
    nested.append(nested)
    assert question("judge", {"x": nested}) is None
    assert Memory().recall([None]) == {}


@pytest.mark.parametrize("on_disk", [False, True])
def test_answers_are_kept_none_too(on_disk: bool, tmp_path: Path) -> None:
    memory = Memory(tmp_path / "folder" / "answers.sqlite" if on_disk else None)
    answers = {A: Answer(0.1 + 0.2), B: Answer(None, {"cost": 2.0, "why": "no √opinion"})}
    memory.remember(answers)
    assert memory.recall([A, B, C, None]) == answers
    again = Memory(tmp_path / "folder" / "answers.sqlite" if on_disk else None)
    assert again.recall([A, B, C]) == (answers if on_disk else {})
    memory.close()
    again.close()


def test_what_another_process_keeps_stays_out_of_the_file(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "answers.sqlite")
    memory.remember({A: Answer(1.0)}, lasting=False)
    assert memory.recall([A]) == {A: Answer(1.0)}
    assert Memory(tmp_path / "answers.sqlite").recall([A]) == {}


def test_the_first_answer_stays(tmp_path: Path) -> None:
    one, other = (Memory(tmp_path / "answers.sqlite") for _ in range(2))
    one.remember({A: Answer(1.0)})
    other.remember({A: Answer(0.0), B: Answer(2.0)})
    assert Memory(tmp_path / "answers.sqlite").recall([A, B]) == {A: Answer(1.0), B: Answer(2.0)}


def test_memory_is_bounded_and_the_file_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_memory, "_MOST_IN_MEMORY", 10)
    questions = [asked({"completion": str(i)}) for i in range(1200)]
    memory = Memory()
    memory.remember({each: Answer(float(i)) for i, each in enumerate(questions)})
    assert set(memory.recall(questions)) == set(questions[-10:])
    lasting = Memory(tmp_path / "answers.sqlite")
    lasting.remember({each: Answer(float(i)) for i, each in enumerate(questions)})
    assert lasting.recall(questions) == {each: Answer(float(i)) for i, each in enumerate(questions)}


def _write(path: Path, first: int) -> None:
    memory = Memory(path)
    for i in range(first, first + 100):
        memory.remember({asked({"completion": str(i)}): Answer(float(i))})
    memory.close()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, where another test left a thread
def test_processes_write_to_one_file_at_a_time_and_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_write, args=(path, first)) for first in (0, 50, 100)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    questions = {i: asked({"completion": str(i)}) for i in range(200)}
    assert Memory(path).recall(questions.values()) == {each: Answer(float(i)) for i, each in questions.items()}


def test_no_text_is_in_the_file(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "answers.sqlite")
    memory.remember({asked({"prompt": "private-words"}, identity="some-judge"): Answer(1.0)})
    memory.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"private-words" not in content
    assert b"1.0" in content


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("These are my notes, and no answers at all.\n" * 100)
    for path in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "answers.sqlite", tmp_path):
        with pytest.raises(ValueError, match=r"cache='.*' cannot be used: .*Give it another path"):
            Memory(path).recall([A])
    assert (tmp_path / "notes.txt").read_text().startswith("These are my notes")


def test_a_file_that_fails_later_is_named_too(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "answers.sqlite")
    memory.remember({A: Answer(1.0)})
    with sqlite3.connect(tmp_path / "answers.sqlite") as other:
        other.execute("DROP TABLE answers")
    other.close()
    for use in (lambda: memory.remember({B: Answer(1.0)}), lambda: memory.recall([C])):
        with pytest.raises(ValueError, match=r"cache='.*' cannot be used: no such table"):
            use()
    memory.close()
