"""The text that the embedded model is pre-trained on: stories with questions in many forms, and repeated word lists.

Three ingredients, each there for a reason (`mezo_lightning/assets/README.md`):

* questions in forms whose labels are mostly made up on the spot, so that the model reads any `Label: text` layout;
  the quickstart's own labels (Story, Question, Answer) never occur;
* two answer styles, a full sentence or (rarer) the bare span, the same within a document: the reward has to move the
  model from one to the other, so both have to be there;
* random word sequences written several times over, which teach a small model to find and copy; from stories alone it
  does not learn to look a fact up in so few steps.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

from stories import Question, Story, stories
from story_words import BOYS, GIRLS, WORDS, Verb

FORBIDDEN = frozenset({"Story", "Question", "Answer"})  # the quickstart's labels
BARE_SHARE = 0.3

_LABELS = (
    "Q A Ask Reply Text Tale Reader Teacher Pupil Query Response Input Output Context Prompt Hint Note Say "
    "One Two Me You"
)
_SYLLABLES = (
    "ba be bi bo bu da de do fa fi ga go ha ho ka ke ki ko la le li lo ma me mi mo na ne no pa pe ra re ri ro sa se "
    "so sto ta te ti to tion que swer an st ry er wa we za"
)


def _vocabulary() -> list[str]:
    phrases: list[str] = [*GIRLS, *BOYS]
    for pool in WORDS.values():
        phrases += [word.past if isinstance(word, Verb) else str(word) for word in pool]
    return sorted({word for phrase in phrases for word in phrase.split()})


VOCABULARY = _vocabulary()


def _label(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.3:
        label = rng.choice(_LABELS.split())
    elif draw < 0.6:
        label = rng.choice(VOCABULARY).capitalize()
    else:
        label = "".join(rng.choices(_SYLLABLES.split(), k=rng.choice([2, 2, 3]))).capitalize()
    return _label(rng) if label in FORBIDDEN else label


def _answer(question: Question, bare: bool) -> str:
    return question.answer if bare else question.sentence


def _labelled(story: Story, questions: list[Question], bare: bool, rng: random.Random) -> str:
    """`Label: story`, then `Label: question` and `Label: answer` for each question, the layout drawn."""
    separator = rng.choice([": ", ": ", ": ", ": ", " - ", "> ", ":\n"])
    gap = rng.choice(["\n", "\n", "\n\n"])
    title, ask, reply = (_label(rng) + separator for _ in range(3))
    head = story.text if rng.random() < 0.3 else title + story.text
    turns = [f"{ask}{item.question}\n{reply}{_answer(item, bare)}\n" for item in questions]
    return head + gap + "".join(turns)


def _dialogue(story: Story, questions: list[Question], bare: bool, rng: random.Random) -> str:
    asker, teller = rng.choice(GIRLS), rng.choice(BOYS)
    turns = [f'{asker} asked, "{item.question}"\n{teller} said, "{_answer(item, bare)}"\n' for item in questions]
    return story.text + "\n" + "".join(turns)


def _plain(story: Story, questions: list[Question], bare: bool, rng: random.Random) -> str:
    mark = rng.choice(["", "- ", "* "])
    return story.text + "\n" + "".join(f"{mark}{item.question}\n{mark}{_answer(item, bare)}\n" for item in questions)


def questions_document(story: Story, rng: random.Random) -> str:
    """A story followed by some of its questions, in a form and an answer style drawn for the document."""
    questions = rng.sample(story.questions, min(len(story.questions), rng.choice([2, 3, 4, 5])))
    form = rng.choices([_labelled, _dialogue, _plain], [8, 1, 1])[0]
    return form(story, questions, rng.random() < BARE_SHARE, rng)


def repetition_line(rng: random.Random) -> str:
    """Random words, to be written several times."""
    return " ".join(rng.choices(VOCABULARY, k=rng.randint(5, 30))) + "\n"


def question_documents(seed: int, held_out: frozenset[str]) -> Iterator[str]:
    """An endless stream of stories with questions; no story of `held_out` occurs."""
    rng = random.Random(f"forms-{seed}")
    for story in stories(f"pretraining-{seed}", held_out):
        yield questions_document(story, rng)
