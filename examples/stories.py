"""Short stories in simple English, with questions whose answers are spans of the story.

A story is an opening, the arrival of a second child, a few events in any order, and an ending, each told in one of
several ways (`story_grammar.py`). No word is drawn twice within a story, so every question has one right answer.
Everything is a function of the `random.Random` that is handed in.

    >>> story = tell(random.Random(0))
    >>> story.text, story.questions[0]
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from story_grammar import ARRIVALS, ENDINGS, EVENTS, OPENINGS_ALONE, OPENINGS_TOGETHER, Ask, Beat
from story_words import BOYS, GIRLS, WORDS, Noun, Verb

ASIDES = (
    "Nobody else was there.",
    "The birds were singing.",
    "It took a very long time.",
    "They laughed and laughed.",
    "What a surprise!",
    "Everything was quiet.",
    "It was not far.",
    "Who would have thought it?",
    "They did not say a word.",
    "And that was that.",
)


@dataclass(frozen=True)
class Question:
    """A question about a story, its answer as a full sentence, and as the bare span of the story."""

    kind: str
    question: str
    sentence: str
    answer: str


@dataclass(frozen=True)
class Story:
    """A told story and everything that can be asked about it."""

    text: str
    questions: tuple[Question, ...]

    def row(self, question: Question) -> dict[str, object]:
        """The story with one of its questions, as a row of the data set."""
        return {
            "story": self.text,
            "question": question.question,
            "answers": [question.answer],
            "kind": question.kind,
        }


class _Slots(dict[str, "str | Noun | Verb"]):
    """Slot values of one beat, drawn when first named; `used` keeps the beats of a story apart."""

    def __init__(self, rng: random.Random, used: set[str], names: dict[str, str]) -> None:
        super().__init__(names)
        self._rng = rng
        self._used = used

    def __missing__(self, slot: str) -> str | Noun | Verb:
        pool = WORDS[slot.rstrip("2")]
        value = self._rng.choice(pool)
        while str(value) in self._used:
            value = self._rng.choice(pool)
        self._used.add(str(value))
        self[slot] = value
        return value


def _sentence(template: str, slots: _Slots) -> str:
    text = template.format_map(slots)
    return text[0].upper() + text[1:]


def _tell_beat(beat: Beat, slots: _Slots, rng: random.Random) -> tuple[str, list[Question]]:
    telling = _sentence(rng.choice(beat.tellings), slots)

    def ask(item: Ask) -> Question:
        return Question(
            item.kind,
            _sentence(item.question, slots),
            _sentence(item.sentence, slots),
            item.answer.format_map(slots),
        )

    questions = [ask(item) for item in beat.asks]
    return telling, [question for question in questions if question.answer in telling]


def tell(rng: random.Random) -> Story:
    """One story of four to six sentences."""
    girl, boy = rng.choice(GIRLS), rng.choice(BOYS)
    first, second = rng.choice([(girl, boy), (boy, girl)])
    pronoun = "her" if first == girl else "his"
    together = rng.random() < 0.4
    middle = rng.sample(EVENTS, rng.choice([1, 2, 2]))
    beats = [rng.choice(OPENINGS_TOGETHER)] if together else [rng.choice(OPENINGS_ALONE), rng.choice(ARRIVALS)]
    used: set[str] = set()
    sentences: list[str] = []
    questions: list[Question] = []
    for place, beat in enumerate([*beats, *middle, rng.choice(ENDINGS)]):
        swap = place >= len(beats) and rng.random() < 0.5
        x, y = (second, first) if swap else (first, second)
        telling, asked = _tell_beat(beat, _Slots(rng, used, {"x": x, "y": y, "her": pronoun}), rng)
        sentences.append(telling)
        questions += asked
    if rng.random() < 0.3:
        sentences.insert(rng.randrange(len(beats), len(sentences)), rng.choice(ASIDES))
    return Story(" ".join(sentences), tuple(questions))


def stories(seed: str, exclude: frozenset[str] = frozenset()) -> Iterator[Story]:
    """An endless stream of different stories, none of them in `exclude`; a `seed` gives the same stream anywhere."""
    rng = random.Random(seed)
    seen = set(exclude)
    while True:
        story = tell(rng)
        if story.text not in seen:
            seen.add(story.text)
            yield story


ASKED = frozenset({"object", "place", "origin", "person", "dream", "craft", "gift", "thief", "wish", "tale"})
"""Kinds that the splits ask for: things, people and places. The text for pre-training asks for all kinds."""


def splits(seed: int, sizes: dict[str, int]) -> dict[str, list[dict[str, object]]]:
    """Rows of each split, one question a story; no story is in two splits.

    Args:
        seed: Decides the stories and the questions.
        sizes: How many stories each split is made from; those that nothing of ``ASKED`` can be asked about give no row.
    """
    stream = stories(f"splits-{seed}")
    rng = random.Random(f"questions-{seed}")
    return {
        name: [
            story.row(rng.choice(asked))
            for story, _ in zip(stream, range(size), strict=False)
            if (asked := _asked(story))
        ]
        for name, size in sizes.items()
    }


def _asked(story: Story) -> list[Question]:
    return [question for question in story.questions if question.kind in ASKED]
