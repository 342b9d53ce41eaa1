"""The words of the embedded stories: for each slot of a sentence, what can stand there."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A noun phrase with its article: `a red ball`; a slot `{thing.the}` gives `the red ball`."""

    text: str

    def __str__(self) -> str:
        return self.text

    @property
    def the(self) -> str:
        """The phrase with a definite article."""
        return "the " + self.text.split(" ", 1)[1]

    @property
    def The(self) -> str:
        """The same at the start of a sentence."""
        return "T" + self.the[1:]


@dataclass(frozen=True)
class Verb:
    """A verb as questions and stories need it: `go`, `went`."""

    base: str
    past: str


def _nouns(adjectives: str, nouns: str) -> tuple[Noun, ...]:
    pairs = [f"{adjective} {noun}" for adjective in adjectives.split() for noun in nouns.split()]
    return tuple(Noun(("an " if pair[0] in "aeiou" else "a ") + pair) for pair in pairs)


def _list(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split(","))


def _verbs(text: str) -> tuple[Verb, ...]:
    return tuple(Verb(*item.split("/")) for item in _list(text))


GIRLS = _list(
    "Ella, Mia, Lucy, Rosa, Nina, Clara, Ivy, Ada, Maya, Zoe, Lena, Tess, Ruby, Hana, Olga, Amina, Greta, Freya, "
    "Kira, Nora"
)
BOYS = _list(
    "Finn, Ben, Sam, Leo, Omar, Jack, Hugo, Max, Theo, Noah, Kofi, Luca, Felix, Oscar, Ravi, Emil, Anton, "
    "Dan, Milo, Pablo"
)

WORDS: dict[str, tuple[str, ...] | tuple[Noun, ...] | tuple[Verb, ...]] = {
    "thing": _nouns(
        "red blue green yellow golden silver tiny old shiny strange striped dusty little heavy pretty purple",
        "ball key kite shell coin hat drum book map feather lamp bell boat rope ring cup basket scarf flute mirror "
        "button whistle marble ribbon spoon umbrella stone box letter clock",
    ),
    "pet": _nouns(
        "brown little white sleepy clever fluffy lazy black",
        "dog kitten goat pony duck rabbit parrot mouse lamb turtle",
    ),
    "thief": _nouns("hungry cheeky sly noisy grey", "fox crow goose monkey squirrel seagull"),
    "craft": _nouns(
        "paper wooden wobbly tall beautiful huge", "boat castle bridge mask robot rocket tower crown puppet nest"
    ),
    "tale": _nouns("sleepy brave lonely clumsy kind grumpy", "dragon giant king witch knight whale bear queen"),
    "job": tuple(
        Noun(text)
        for text in _list(
            "a pilot, a baker, a doctor, a singer, a farmer, a sailor, a painter, a teacher, a pirate, a dancer, "
            "an artist, a cook"
        )
    ),
    "petname": _list(
        "Pip, Biscuit, Socks, Pepper, Button, Cloud, Muffin, Ziggy, Pickle, Star, Bruno, Nutmeg, Tiger, Honey"
    ),
    "place": _list(
        "the market, the pond, the old mill, the forest, the beach, the library, the school, the farm, the harbour, "
        "the park, the castle, the station, the bakery, the river, the museum, the village, the garden, the lake, "
        "the lighthouse, the green hill, the zoo, the windmill, the toy shop, the meadow"
    ),
    "spot": _list(
        "under the bench, behind the shed, near the well, in the tall grass, under the bridge, beside the gate, "
        "behind a big rock, in the attic, under the stairs, on the roof, near the fence, in a hollow tree, "
        "beside the road, in the barn, behind the curtain, under the apple tree, on the steps, in the cellar"
    ),
    "person": _list(
        "the baker, the old sailor, the farmer, the postman, the gardener, the captain, the shepherd, the clockmaker, "
        "the librarian, the fisherman, the blacksmith, the neighbour"
    ),
    "food": _list(
        "warm bread, apple pie, hot soup, sweet plums, honey cakes, cheese sandwiches, fresh cherries, pancakes, "
        "roasted corn, tomato soup, ginger cookies, sour lemons, boiled eggs, noodles, ripe pears, chocolate cake"
    ),
    "game": _list("hide and seek, tag, catch, chess, cards, football, pirates, marbles, leapfrog, dominoes"),
    "glad": _list("happy, proud, brave, lucky, excited, calm, cheerful, surprised, thankful, glad"),
    "sad": _list("sad, angry, worried, tired, lonely, nervous, upset, afraid, bored, cross"),
    "reason": _list(
        "the door was locked, the bus was late, the kite was torn, nobody came to play, the milk was sour, "
        "the bridge was broken, the lamp went out, the boat had a hole, the shop was closed, the path was muddy, "
        "the wheel fell off, the puppy was ill, the map was wet, the road was dark"
    ),
    "weather": _list("rainy, windy, sunny, snowy, foggy, cloudy, stormy, frosty, misty, warm"),
    "part": _list("morning, afternoon, evening, day"),
    "weekday": _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday"),
    "hour": _list(
        "at dawn, at noon, after breakfast, before lunch, at midnight, after school, before supper, at sunset"
    ),
    "move": _verbs("go/went, walk/walked, run/ran, ride/rode, hurry/hurried, wander/wandered, race/raced"),
    "get": _verbs("find/found, see/saw, spot/spotted, discover/discovered, notice/noticed"),
    "make": _verbs("make/made, build/built, paint/painted, draw/drew, finish/finished"),
    "pick": _verbs("choose/chose, want/wanted, win/won, borrow/borrowed, wrap/wrapped"),
    "hold": _verbs("bring/brought, carry/carried, hide/hid, drop/dropped, lose/lost, leave/left"),
    "eat": _verbs("eat/ate, share/shared, cook/cooked, taste/tasted"),
    "kin": _list("aunt, uncle, grandmother, grandfather, sister, brother, cousin"),
}
