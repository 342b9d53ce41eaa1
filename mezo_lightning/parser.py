"""jsonargparse's parser with three changes.

Defaults of one class are not kept for another, the help of a class shows its whole docstring, and a mistake is one
sentence (``mistakes.py``).
"""

from __future__ import annotations

import inspect
import pydoc
import re
from argparse import SUPPRESS, ArgumentError, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import docstring_parser
from jsonargparse import DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from mezo_lightning.mistakes import sentence

_HELP_OF_A_CLASS = "Help for --"  # so jsonargparse begins the description of the parser that --CLASS.help prints


class _WithLines(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of a docstring as they are: some are formulas and lists."""


class MeZOParser(LightningArgumentParser):
    """The parser of the command line, and of every class that is named in it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.classes: list[type] = []
        """Whose arguments it takes."""

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> list[str]:
        """Take the arguments of a class."""
        self.classes.append(theclass)
        return super().add_class_arguments(theclass, *args, **kwargs)

    def get_defaults(self, *args: Any, **kwargs: Any) -> Namespace:
        """All defaults; of a class that has its own settings, the class alone.

        jsonargparse keeps settings of the same name when another class is named, as it should where somebody has
        written them. It fills in those of the class that is finally chosen by itself.
        """
        defaults = super().get_defaults(*args, **kwargs)
        for action in self._actions:
            if _has_its_own_settings(action.default) and isinstance(defaults.get(action.dest), Namespace):
                defaults[action.dest].pop("init_args", None)
        return defaults

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Namespace:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse words; two levels down jsonargparse turns a null into the word None, which is turned back here."""
        if args is not None and getattr(self, "_inner_parser", False):
            args = [re.sub(r"^(--[\w.]+=)None$", r"\1null", word) for word in args]
        return super().parse_args(args, *more, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise one sentence in the place of a tree of types that were tried."""
        raise ArgumentError(None, sentence(self, message, ex)) from ex

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help; of a class, its docstring first."""
        if self.classes and (self.description or "").startswith(_HELP_OF_A_CLASS):
            described = self.classes[0]
            text = docstring_parser.parse(inspect.getdoc(described) or "", docstring_parser.DocstringStyle.GOOGLE)
            self.usage = SUPPRESS  # it has nothing but the names that follow
            self.description = f"{self.description}\n\n{text.description or ''}".rstrip()
            self.formatter_class = _WithLines
            for group in self._action_groups:
                if group.title and (text.short_description or "").rstrip(".") == group.title.rstrip("."):
                    group.title = "settings"
        return super().format_help(*args, **kwargs)


def _has_its_own_settings(default: Any) -> bool:
    """Whether a default is a class with the settings that it has anyway."""
    if not isinstance(default, Mapping | Namespace) or "class_path" not in default:
        return False
    found: Any = pydoc.locate(default["class_path"])
    parameters = inspect.signature(found).parameters
    given = dict(default.get("init_args") or {})
    return all(_is_default(value, parameters[name].default) for name, value in given.items())


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Mapping | Namespace) and "class_path" in value:
        return type(default) is pydoc.locate(value["class_path"]) and _has_its_own_settings(value)
    return value == default
