"""Answers that were received once and are never asked for again: in memory, and on disk where several runs share them.

A question is what makes a reward say what it says: its identity, and all that it is told of a row. Only answers are
kept, None (no opinion) too; never a failure. On disk they are in one SQLite file in WAL mode, which many processes may
read and write at a time, of one machine: a network file system has no locks that WAL could use. The file holds a hash
of each question and no text of it, and the first answer to a question is the one that stays, with the notes that the
reward took.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mezo_lightning.rewarding.answers import Note

Question = bytes
"""A hash of what is asked."""

_MOST_IN_MEMORY = 1 << 17  # some 50 MB; the oldest are forgotten first
_AT_ONCE = 500  # of SQLite's variables
_PATIENCE = 60.0  # seconds for another process to finish its writing


@dataclass(frozen=True)
class Answer:
    """What a reward said of one row."""

    value: float | None
    """Finite; None for no opinion."""
    notes: Mapping[str, Note] = field(default_factory=dict)
    """What it said beside that, by name."""


def question(identity: str, told: Mapping[str, Any]) -> Question | None:
    """What is asked, as a hash.

    Args:
        identity: Of the reward: whatever changes its answers changes it.
        told: The arguments that the reward is given for one row.

    Returns:
        The hash; None where an argument has no content that another process would see the same way.
    """
    try:
        text = json.dumps([identity, told], sort_keys=True, default=_content)
    except (TypeError, ValueError, AttributeError, pickle.PicklingError, RecursionError):
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _content(value: Any) -> str:
    """What JSON has no word for, such as a date or an image."""
    return f"{type(value).__module__}.{type(value).__qualname__}:{pickle.dumps(value, protocol=4).hex()}"


class Memory:
    """All answers that are known.

    Args:
        path: The file that keeps them; None to forget them with the process.
    """

    def __init__(self, path: str | Path | None = None):
        self._known: dict[Question, Answer] = {}
        self._disk = None if path is None else Disk(Path(path))

    def recall(self, questions: Iterable[Question | None]) -> dict[Question, Answer]:
        """The answers that are known to some questions."""
        asked = {each for each in questions if each is not None}
        found = {each: self._known[each] for each in asked if each in self._known}
        if self._disk is not None and (unknown := sorted(asked - found.keys())):
            on_disk = self._disk.read(unknown)
            self._keep(on_disk)
            found |= on_disk
        return found

    def remember(self, answers: Mapping[Question, Answer], *, lasting: bool = True) -> None:
        """Keep answers that were received.

        Args:
            answers: By question.
            lasting: Whether they go to disk; not where another process sees to that.
        """
        self._keep(answers)
        if lasting and self._disk is not None and answers:
            self._disk.write(answers)

    def close(self) -> None:
        """Close the file, if there is one; it opens again by itself."""
        if self._disk is not None:
            self._disk.close()

    def _keep(self, answers: Mapping[Question, Answer]) -> None:
        self._known.update(answers)
        for _ in range(len(self._known) - _MOST_IN_MEMORY):
            del self._known[next(iter(self._known))]


class Disk:
    """Answers in an SQLite file.

    Args:
        path: The file; it is created where there is none.
    """

    def __init__(self, path: Path):
        self._path = path
        self._open: sqlite3.Connection | None = None

    def read(self, questions: Sequence[Question]) -> dict[Question, Answer]:
        """The answers that the file has to some questions."""
        found = {}
        for some in _pieces(questions, _AT_ONCE):
            marks = ", ".join("?" * len(some))
            query = f"SELECT question, answer FROM answers WHERE question IN ({marks})"
            with self._named():
                found |= {key: _parse(text) for key, text in self._file.execute(query, some)}
        return found

    def write(self, answers: Mapping[Question, Answer]) -> None:
        """Add answers; what the file knows already stays."""
        rows = [(key, _text(answer)) for key, answer in answers.items()]
        with self._named(), self._file:  # one transaction
            self._file.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
            self._open = None

    @property
    def _file(self) -> sqlite3.Connection:
        if self._open is None:
            with self._named():
                self._open = self._opened()
                weakref.finalize(self, self._open.close)
        return self._open

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, sqlite3.Error) as error:
            raise ValueError(f"cache={str(self._path)!r} cannot be used: {error}. Give it another path.") from error

    def _opened(self) -> sqlite3.Connection:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = sqlite3.connect(self._path, timeout=_PATIENCE, check_same_thread=False)
        try:
            file.execute("PRAGMA journal_mode = WAL")
            file.execute("PRAGMA synchronous = NORMAL")  # a crash of the machine may lose the last answers, no more
            with file:
                file.execute(
                    "CREATE TABLE IF NOT EXISTS answers (question BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
                )
        except BaseException:
            file.close()
            raise
        return file


def _text(answer: Answer) -> str:
    assert answer.value is None or math.isfinite(answer.value), "only answers are kept"
    return json.dumps({"value": answer.value} | ({"notes": dict(answer.notes)} if answer.notes else {}))


def _parse(text: str) -> Answer:
    fields = json.loads(text)
    return Answer(fields["value"], fields.get("notes", {}))


def _pieces(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
