"""The sentences of the embedded stories: data only.

A `Beat` is one thing that happens: the ways to tell it, and what can be asked about it afterwards. Slots such as
`{thing}` are drawn by `stories.py` from `story_words.py`; `{x}` is who acts, `{y}` the other child. Every answer is a
span of the telling, and a full sentence shares its words with it, so that looking a fact up is finding and copying.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ask:
    """One question about a beat, its answer in a full sentence, and the bare span."""

    kind: str
    question: str
    sentence: str
    answer: str


@dataclass(frozen=True)
class Beat:
    """One event of a story: its possible tellings, and the questions that any of them answers."""

    tellings: tuple[str, ...]
    asks: tuple[Ask, ...] = ()


# An opening names {x}, and those of the second list {y} too.
OPENINGS_ALONE = (
    Beat(
        (
            "One {weather} {part}, {x} {move.past} to {place}.",
            "It was a {weather} {part} when {x} {move.past} to {place}.",
        ),
        (
            Ask("place", "Where did {x} {move.base}?", "{x} {move.past} to {place}.", "{place}"),
            Ask("weather", "What was the weather like?", "The weather was {weather}.", "{weather}"),
        ),
    ),
    Beat(
        ("On {weekday}, {x} {move.past} to {place}.", "Last {weekday}, {x} {move.past} to {place} all alone."),
        (
            Ask("place", "Where did {x} {move.base}?", "{x} {move.past} to {place}.", "{place}"),
            Ask(
                "time", "When did {x} {move.base} to {place}?", "{x} {move.past} to {place} on {weekday}.", "{weekday}"
            ),
        ),
    ),
    Beat(
        (
            "{x} woke up {hour} and {move.past} to {place}.",
            "{x} woke up {hour}, put on a coat and {move.past} to {place}.",
        ),
        (
            Ask("place", "Where did {x} {move.base}?", "{x} {move.past} to {place}.", "{place}"),
            Ask("time", "When did {x} wake up?", "{x} woke up {hour}.", "{hour}"),
        ),
    ),
    Beat(
        (
            "{x} lived near {place} with {pet} named {petname}.",
            "Once there was a child called {x}, who lived near {place} with {pet} named {petname}.",
        ),
        (
            Ask("pet", "What was the name of {pet.the}?", "{pet.The} was named {petname}.", "{petname}"),
            Ask("place", "Where did {x} live?", "{x} lived near {place}.", "near {place}"),
        ),
    ),
    Beat(
        ("{x} wanted to be {job}, just like {her} {kin}.", "More than anything, {x} wanted to be {job}."),
        (Ask("wish", "What did {x} want to be?", "{x} wanted to be {job}.", "{job}"),),
    ),
)

OPENINGS_TOGETHER = (
    Beat(
        (
            "One {weather} {part}, {x} and {y} {move.past} to {place}.",
            "It was a {weather} {part}, so {x} and {y} {move.past} to {place}.",
        ),
        (
            Ask("place", "Where did {x} and {y} {move.base}?", "{x} and {y} {move.past} to {place}.", "{place}"),
            Ask("weather", "What was the weather like?", "The weather was {weather}.", "{weather}"),
        ),
    ),
    Beat(
        (
            "{x} came from {place}, and {y} came from {place2}.",
            "{x} and {y} were friends, though {x} came from {place} and {y} came from {place2}.",
        ),
        (
            Ask("origin", "Where did {x} come from?", "{x} came from {place}.", "{place}"),
            Ask("origin", "Where did {y} come from?", "{y} came from {place2}.", "{place2}"),
        ),
    ),
    Beat(
        (
            "Every {weekday}, {x} played {game} with {y}.",
            "{x} often played {game} with {y}, most of all on a {weather} {part}.",
        ),
        (
            Ask("game", "What did {x} play with {y}?", "{x} played {game} with {y}.", "{game}"),
            Ask("friend", "Who did {x} play {game} with?", "{x} played {game} with {y}.", "{y}"),
        ),
    ),
    Beat(
        ("{x} had {thing}, and {y} had {thing2}.", "Long ago, {x} had {thing} and {y} had {thing2}."),
        (
            Ask("object", "What did {x} have?", "{x} had {thing}.", "{thing}"),
            Ask("object", "What did {y} have?", "{y} had {thing2}.", "{thing2}"),
        ),
    ),
)

# How {y}, who has not been named yet, comes in.
ARRIVALS = (
    Beat(
        ("Soon {y} came from {place} with {thing}.", "After a while, {y} came from {place} with {thing}."),
        (
            Ask("origin", "Where did {y} come from?", "{y} came from {place}.", "{place}"),
            Ask("object", "What did {y} come with?", "{y} came with {thing}.", "{thing}"),
        ),
    ),
    Beat(
        (
            "On the way, {x} met {y}, who was {sad} because {reason}.",
            "One day {x} met {y}. The poor child was {sad} because {reason}.",
        ),
        (
            Ask("reason", "Why was {y} {sad}?", "{y} was {sad} because {reason}.", "{reason}"),
            Ask("friend", "Who did {x} meet?", "{x} met {y}.", "{y}"),
        ),
    ),
    Beat(
        (
            "Then {x} sat down beside {y}, who had {thing}.",
            "Next to the path, {x} sat down beside {y}, who had {thing}.",
        ),
        (
            Ask("friend", "Who did {x} sit beside?", "{x} sat beside {y}.", "{y}"),
            Ask("object", "What did {y} have?", "{y} had {thing}.", "{thing}"),
        ),
    ),
)

EVENTS = (
    Beat(
        (
            "{x} {get.past} {thing} {spot}.",
            "Suddenly {x} {get.past} {thing} {spot}!",
            "Before long, {x} {get.past} {thing} {spot}.",
        ),
        (
            Ask("object", "What did {x} {get.base}?", "{x} {get.past} {thing}.", "{thing}"),
            Ask("spot", "Where was {thing.the}?", "{thing.The} was {spot}.", "{spot}"),
        ),
    ),
    Beat(
        ("{x} bought {thing} from {person}.", "With the last penny, {x} bought {thing} from {person}."),
        (
            Ask("object", "What did {x} buy?", "{x} bought {thing}.", "{thing}"),
            Ask("person", "Who did {x} buy {thing.the} from?", "{x} bought {thing.the} from {person}.", "{person}"),
        ),
    ),
    Beat(
        ("{x} gave {y} {thing}.", "To say thank you, {x} gave {y} {thing}.", "{x} smiled and gave {y} {thing}."),
        (Ask("gift", "What did {x} give {y}?", "{x} gave {y} {thing}.", "{thing}"),),
    ),
    Beat(
        ("{x} {make.past} {craft} for {person}.", "All afternoon {x} worked, and at last {x} {make.past} {craft}."),
        (Ask("craft", "What did {x} {make.base}?", "{x} {make.past} {craft}.", "{craft}"),),
    ),
    Beat(
        ("{x} {hold.past} {thing} {spot}.", "In a hurry, {x} {hold.past} {thing} {spot}."),
        (
            Ask("object", "What did {x} {hold.base}?", "{x} {hold.past} {thing}.", "{thing}"),
            Ask("spot", "Where did {x} {hold.base} {thing.the}?", "{x} {hold.past} {thing.the} {spot}.", "{spot}"),
        ),
    ),
    Beat(
        ("Then {thief} stole {food} from {x}!", "While {x} was not looking, {thief} stole {food}."),
        (
            Ask("thief", "What stole the food?", "{thief.The} stole the food.", "{thief}"),
            Ask("food", "What did {thief.the} steal?", "{thief.The} stole {food}.", "{food}"),
        ),
    ),
    Beat(
        (
            "At home, {x} {eat.past} {food}.",
            "When the bell rang, {x} {eat.past} {food}.",
            "{x} was hungry and {eat.past} {food}.",
        ),
        (Ask("food", "What did {x} {eat.base}?", "{x} {eat.past} {food}.", "{food}"),),
    ),
    Beat(
        ("{x} was {sad} because {reason}.", "But now {x} was {sad} because {reason}."),
        (Ask("reason", "Why was {x} {sad}?", "{x} was {sad} because {reason}.", "{reason}"),),
    ),
    Beat(
        ("{pet} slept {spot}.",),
        (Ask("spot", "Where did {pet.the} sleep?", "{pet.The} slept {spot}.", "{spot}"),),
    ),
    Beat(
        (
            "Later {person} told {x} a tale about {tale}.",
            "On a bench in the sun, {person} told {x} a tale about {tale}.",
        ),
        (
            Ask("tale", "What was the tale about?", "The tale was about {tale}.", "{tale}"),
            Ask("person", "Who told {x} a tale?", "It was {person} who told {x} a tale.", "{person}"),
        ),
    ),
    Beat(
        (
            "{x} {pick.past} {thing}, but {y} {pick.past} {thing2}.",
            "While {x} {pick.past} {thing}, {y} {pick.past} {thing2}.",
        ),
        (
            Ask("object", "What did {x} {pick.base}?", "{x} {pick.past} {thing}.", "{thing}"),
            Ask("object", "What did {y} {pick.base}?", "{y} {pick.past} {thing2}.", "{thing2}"),
        ),
    ),
    Beat(
        ("{x} had {food} for lunch, and {y} had {food2}.", "For supper, {x} had {food} and {y} had {food2}."),
        (
            Ask("food", "What did {x} have to eat?", "{x} had {food}.", "{food}"),
            Ask("food", "What did {y} have to eat?", "{y} had {food2}.", "{food2}"),
        ),
    ),
    Beat(
        ("{x} got help from {person}.", "The gate was stuck, but {x} got help from {person}."),
        (Ask("person", "Who did {x} get help from?", "{x} got help from {person}.", "{person}"),),
    ),
)

ENDINGS = (
    Beat(
        ("In the end, {x} felt {glad}.", "{x} went home and felt {glad}.", "What a day! {x} felt {glad}."),
        (Ask("feeling", "How did {x} feel?", "{x} felt {glad}.", "{glad}"),),
    ),
    Beat(
        ("{x} felt {glad}, but {y} felt {sad}.", "At last {x} felt {glad}, while {y} felt {sad}."),
        (
            Ask("feeling", "How did {x} feel?", "{x} felt {glad}.", "{glad}"),
            Ask("feeling", "How did {y} feel?", "{y} felt {sad}.", "{sad}"),
        ),
    ),
    Beat(
        ("That night, {x} dreamed about {tale}.", "When the moon came up, {x} dreamed about {tale}."),
        (Ask("dream", "What did {x} dream about?", "{x} dreamed about {tale}.", "{tale}"),),
    ),
    Beat(
        ("They walked home {hour} and were friends for ever.", "They laughed all the way home."),
    ),
)
