r"""Rows into text: templates such as `"Question: {question}\nAnswer:"`, in the syntax of `str.format`.

A field may go inside its column (`{answers[0]}`, `{answers[text][0]}`) and may ask for one of a few string methods in
the place of a format (`{sentence:strip}`), because data sets come with stray spaces and capitals.
"""

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mezo_lightning.data.batch import Batch
from mezo_lightning.data.rows import Row

_METHODS: dict[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "upper": str.upper,
    "capitalize": str.capitalize,
}


class _Formatter(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("the value is missing (None)")
        if format_spec in _METHODS:
            return _METHODS[format_spec](str(value))
        return super().format_field(value, format_spec)


_FORMATTER = _Formatter()


@dataclass(frozen=True)
class Template:
    """A template of the data module's argument `field`, which error messages name."""

    field: str
    text: str

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template names, each once."""
        try:
            fields = [name for _, name, _, _ in _FORMATTER.parse(self.text) if name is not None]
        except ValueError as error:
            raise ValueError(f"{self.field}={self.text!r}: {error}; write {{{{ and }}}} for braces.") from error
        return tuple(dict.fromkeys(name.replace("[", ".").split(".")[0] for name in fields))

    def check(self, available: Mapping[str, Any]) -> None:
        """Raises ValueError where the template names a column that is not available."""
        for column in self.columns:
            if column not in available:
                raise ValueError(
                    f"{self.field} names the column {column!r}, which the data does not have; "
                    f"its columns are {', '.join(available)}."
                )

    def fill(self, row: Mapping[str, Any], number: int) -> str:
        """The text for one row, whose number is for error messages."""
        try:
            return _FORMATTER.vformat(self.text, (), row)
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.field}={self.text!r} does not fit row {number}: {error}.") from error


class Renderer:
    """Templates and label column: rows in, Batch out."""

    def __init__(
        self,
        prompt: str,
        target: str | None,
        options: list[str] | None,
        label: str | None,
        label_names: list[str] | None,
    ) -> None:
        self.prompt = Template("prompt", prompt)
        self.target = None if target is None else Template("target", target)
        self.options = [Template(f"options[{place}]", text) for place, text in enumerate(options or [])]
        self.label, self.label_names = label, label_names
        if len(self.options) == 1:
            raise ValueError("options holds one template: a choice needs two or more.")
        if label is not None and not self.options:
            raise ValueError(f"label={label!r} says which option is right, and there are no options: set them.")
        if label_names is not None and (label is None or len(label_names) != len(self.options)):
            raise ValueError("label_names goes with label, and names each of the options once.")

    def render(self, rows: Sequence[Row], source: str, labelled: bool = True) -> Batch:
        """All rows as one Batch; without target and answers where the rows are not labelled."""
        try:
            return self._render(rows, labelled)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _render(self, rows: Sequence[Row], labelled: bool) -> Batch:
        target = self.target if labelled else None
        for template in (self.prompt, *self.options, *([target] if target else [])):
            template.check(rows[0])
        if labelled and self.label is not None and self.label not in rows[0]:
            raise ValueError(f"label={self.label!r} is no column of the data; they are {', '.join(rows[0])}.")
        prompts = tuple(text.strip(" ") for text in _fill(self.prompt, rows))
        targets = tuple(_fill(target, rows)) if target else None
        options = tuple(zip(*(_fill(option, rows) for option in self.options), strict=True)) if self.options else None
        answers = None
        if labelled and self.label is not None:
            assert options is not None
            answers = tuple(self._answer(row, options[number], number) for number, row in enumerate(rows))
        columns = {name: tuple(row[name] for row in rows) for name in rows[0]}
        right = targets
        if right is None and options is not None and answers is not None:
            right = tuple(choices[answer] for choices, answer in zip(options, answers, strict=True))
        if right is not None and "target" not in columns:
            columns["target"] = right
        return Batch(tuple(range(len(rows))), prompts, targets, options, answers, columns)

    def _answer(self, row: Row, options: Sequence[str], number: int) -> int:
        """The number of the right option: by its given name, by its own text, or as it stands."""
        assert self.label is not None
        value = row[self.label]
        if self.label_names is not None:
            if str(value).strip() in self.label_names:
                return self.label_names.index(str(value).strip())
            raise ValueError(f"label={self.label!r} is {value!r} in row {number}, which label_names does not name.")
        texts = [option.strip() for option in options]
        if isinstance(value, str) and value.strip() in texts:
            return texts.index(value.strip())
        if isinstance(value, int) and 0 <= value < len(options):
            return int(value)
        raise ValueError(
            f"label={self.label!r} is {value!r} in row {number}; it should be the right option's number, "
            f"0 to {len(options) - 1}, or its text, one of {texts} (or set label_names)."
        )


def _fill(template: Template, rows: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    return (template.fill(row, number) for number, row in enumerate(rows))
