"""What is wrong with a command line, in a sentence: the field, the value, and what it may be.

jsonargparse tells of every type that it has tried, of the field and of all that hold it. The parser of each class
passes its ``error`` through ``sentence``: the innermost one makes a sentence, and those around it add to the name of
the field. Between two of them the sentence travels inside of jsonargparse's text, between marks.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from typing import Any

from torch.optim import Optimizer

_FIRST, _BETWEEN, _LAST = "\x02", "\x1f", "\x03"
_MARKED = re.compile(f"{_FIRST}([^{_BETWEEN}]*){_BETWEEN}([^{_LAST}]*){_LAST}")
_OF_A_KEY = re.compile(r'Parser key "([^"]+)"|--([\w.]+)\.help(?=: )')
_UNKNOWN = re.compile(r"(?:Group '(?P<group>\S+)' does not accept o|[oO])ption '(?P<name>\S+)'")
_UNION = "Does not validate against any of the Union subtypes"
_VALUE = re.compile(
    r"(?:Given value: |Got value: |dot import path string: )(.*)$"
    r"|Expected a path but (.*) either not accessible|subclasses with name (\w+)",
    re.M,
)
_MOST = 300  # characters of a message that nothing is known of
_MANY = 20  # names are no help in reading


def sentence(parser: ArgumentParser, message: str, error: Exception | None = None) -> str:
    """The sentence for a message of jsonargparse's, marked.

    Args:
        parser: Whose error it is.
        message: The message.
        error: What it was raised from.
    """
    found = _OF_A_KEY.match(message)
    key = found[1] or found[2] if found else ""
    inner = max(_MARKED.findall(message), key=lambda pair: pair[0].count("."), default=None)
    if inner is not None:
        path, said = inner
        return _marked(".".join(filter(None, (key, path))), said)
    if found:
        return _marked(key, _about_value(parser, key, message[found.end() :].lstrip(": \n")))
    owner = getattr(error, "subcommand_parser", parser)
    return _marked("", _about_name(owner, message))


def plain(error: BaseException) -> str:
    """What an error says, without marks and without the types that were tried for a value in vain."""
    found = _MARKED.search(str(error))
    if found is None:
        return _of_a_union(str(error))
    path, said = found.groups()
    return f"{path}{'' if said.startswith('=') else ': ' if path else ''}{said}"


def _of_a_union(text: str) -> str:
    """Of what several types said to a value, what the first said that it was meant for."""
    errors = re.search(r"\nErrors:\n(.*)\nGiven value type:", text, re.S) if text.startswith(_UNION) else None
    if errors is None:
        return text
    said = [each.strip().replace("\n    ", "\n") for each in re.split("(?m)^  - ", errors[1]) if each.strip()]
    return _of_a_union(next((each for each in said if not each.startswith("Expected a")), said[0]))


def nearest(name: str, names: list[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"; did you mean {lower[close[0]]}?" if close else ""


def _marked(path: str, said: str) -> str:
    return f"{_FIRST}{path}{_BETWEEN}{said}{_LAST}"


def _about_name(parser: ArgumentParser, message: str) -> str:
    """For a name that is none, or one that is missing."""
    classes: list[type] = getattr(parser, "classes", [])
    owner = classes[0].__name__ if len(classes) == 1 else ""
    names = [action.dest for action in parser._actions if not action.dest.endswith("help")]
    needed = message.removeprefix("the following arguments are required: ")
    if needed != message:
        return f"{owner} needs {needed}" if owner else _needed_by_a_command(needed.split(", "))
    word = re.search(r"unrecognized arguments: --([\w.]+)", message)
    option = _UNKNOWN.search(message)
    if word is None and option is None:
        return _short(message)
    if option:
        name = f"{option['group']}.{option['name']}" if option["group"] else option["name"]
    else:
        name = word[1] if word else ""
    if owner:
        return f"{owner} has no {name!r}; it has {', '.join(names) or 'no settings'}{nearest(name, names)}"
    around = name.rpartition(".")[0]
    beside = [each for each in names if each.rpartition(".")[0] == around]
    if not around or not beside:
        return f"there is no option {name}{nearest(name, names)}"
    leaves = [each.rpartition(".")[2] for each in beside]
    return f"there is no option {name}; {around} has {', '.join(leaves)}{nearest(name.rpartition('.')[2], leaves)}"


def _needed_by_a_command(names: list[str]) -> str:
    commands = {name.partition(".")[0] for name in names}
    if len(commands) > 1 or not all("." in name for name in names):
        return f"these are needed: {', '.join(names)}"
    needed = ", ".join(name.partition(".")[2] for name in names)
    how = ": give a file that has them, --config FILE, or write them as options" if "." in needed else ""
    return f"mezo {commands.pop()} needs {needed}{how}"


def _about_value(parser: ArgumentParser, key: str, message: str) -> str:
    """For a value that its field cannot have."""
    hint = next((getattr(action, "_typehint", None) for action in parser._actions if action.dest == key), None)
    values = ["".join(found) for found in _VALUE.findall(message)]
    if hint is None or not values:
        return _short(message)
    value = re.sub("^None$", "null", values[-1].strip().rstrip("."))
    given = re.search(r"class_path='([^']+)'|'class_path': '([^']+)'", value)
    name = (given[1] or given[2]) if given else value
    bases = [leaf for leaf in _leaves(hint) if _is_open(leaf)]
    if bases and re.fullmatch(r"[\w.]+", name):
        return _about_class(name, bases, message)
    words = [str(word) for leaf in _leaves(hint) for word in typing.get_args(leaf)]
    plainly = [_PLAIN.get(leaf, getattr(leaf, "__name__", str(leaf))) for leaf in _leaves(hint) if _is_simple(leaf)]
    expected = ", ".join([*words, *plainly]) if words else " or ".join(plainly)
    wrong = f"is unknown: choose {expected}{nearest(value, words)}" if words else f"is not {expected}"
    return f"={value[:_MOST]!r} {wrong}"


def _about_class(name: str, bases: list[type], message: str) -> str:
    names = sorted({found.__name__ for base in bases for found in _choices(base)})
    why = re.search(r"(No module named \S+?|does not correspond to a subclass of \w+)(?=[.\s]|$)", message)
    said = f"is unknown{f' ({why[1]})' if why else ''}"
    near = nearest(name.rpartition(".")[2], names)
    if any(issubclass(base, Optimizer) for base in bases):
        return f"={name!r} {said}: choose {', '.join(names)}, for other optimizers need gradients"
    known = f"choose {', '.join(names)}" if len(names) <= _MANY else f"there are {len(names)} to choose from"
    return f"={name!r} {said}: {known}{near}"


def _choices(base: type) -> list[type]:
    """The classes that may be named for one; of optimizers this package's, for others need gradients."""
    found = [each for each in _descendants(base) if not inspect.isabstract(each) and not each.__name__.startswith("_")]
    public = [each for each in found if "<locals>" not in each.__qualname__]
    own = [each for each in public if each.__module__.startswith("mezo_lightning.")]
    return own if issubclass(base, Optimizer) else public


def _descendants(base: type) -> Iterator[type]:
    for each in base.__subclasses__():
        yield each
        yield from _descendants(each)
    if issubclass(base, Optimizer):
        yield base


_PLAIN: dict[Any, str] = {
    int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null",
    list: "a list", dict: "a mapping",
}  # fmt: skip


def _leaves(hint: Any) -> Iterator[Any]:
    """The types that a hint joins: of a union its parts, of a callable what it returns, of a list its elements."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        for part in inside:
            yield from _leaves(part)
    elif origin is Callable:
        yield from _leaves(inside[-1])
    elif origin is list:
        yield list
        yield from (leaf for leaf in _leaves(inside[0]) if _is_open(leaf))
    elif origin is typing.Literal:
        yield hint
    else:
        yield origin or hint


def _is_open(leaf: Any) -> bool:
    """Whether a class is named for it."""
    return isinstance(leaf, type) and leaf not in _PLAIN and any(True for _ in _choices(leaf))


def _is_simple(leaf: Any) -> bool:
    return isinstance(leaf, type) and not _is_open(leaf)


def _short(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."
