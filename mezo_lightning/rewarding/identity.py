"""What decides the values of a reward function, as a short text: the key under which its answers are remembered.

The text is the function's name and a hash of its module's source (its helpers are there too), of the values that it
closes over, and of an object's configuration. What another module does, a file it reads or a server it asks is not in
it: such a reward says its own ``identity``, or its user a ``version``. A function whose state cannot be written down,
one that closes over a model for example, gets a text that no other process will ever have.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import os
import re
import sys
import types
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from mezo_lightning.rewarding.importing import loaded_from

_THIS_PROCESS = uuid.uuid4().hex


@runtime_checkable
class Identified(Protocol):
    """A reward that says what decides its values, without secrets."""

    @property
    def identity(self) -> str:
        """Configuration, model name, revision: whatever changes a value changes this."""
        ...


def identity_of(function: Callable[..., Any], *, version: str | None = None, settings: Any = None) -> str:
    """The identity of a reward function.

    Args:
        function: The function, or a callable object.
        version: What the user says in place of a hash of the source.
        settings: What the function is called with besides the rows.
    """
    name = _name(function)
    try:
        state = _state(function, source=version is None)
    except (_UnknownError, RecursionError):
        # Whoever names a version vouches for the rest.
        state = "" if version is not None else f"{_THIS_PROCESS} {id(function)}"
    try:
        settings = _describe(settings)
    except (_UnknownError, RecursionError):
        settings = f"{_THIS_PROCESS} {id(settings)}"
    digest = hashlib.sha256(f"{state}\n{settings}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{name}@{version}:{digest}" if version is not None else f"{name}:{digest}"


class _UnknownError(Exception):
    """There is state that cannot be written down."""


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        return _name(function.func)
    kind = function if isinstance(function, (type, types.FunctionType, types.MethodType)) else type(function)
    module = sys.modules.get(kind.__module__)
    file = None if module is None else loaded_from(module)
    return f"{kind.__module__ if file is None else file.stem}.{kind.__qualname__}"  # wherever the file is


def _state(function: Any, source: bool = True) -> str:
    """All that decides what a function or an object returns."""
    if isinstance(function, Identified):
        return f"{_name(function)} {function.identity}"
    inner = inspect.unwrap(function)
    return _own_state(function, source) + ("" if inner is function else f" of {_state(inner, source)}")


def _own_state(function: Any, source: bool) -> str:
    if isinstance(function, functools.partial):
        return f"partial {_state(function.func, source)} {_describe([list(function.args), function.keywords])}"
    if isinstance(function, types.MethodType):
        return f"{function.__name__} of {_state(function.__self__, source)}"
    if isinstance(function, types.FunctionType):
        return f"{_name(function)} {_source(function) if source else ''} {_describe(_closed_over(function))}"
    if isinstance(function, (types.BuiltinFunctionType, type)):
        return f"{function.__module__}.{function.__qualname__}"
    return f"{_name(function)} {_source(type(function)) if source else ''} {_describe(_fields(function))}"


def _closed_over(function: types.FunctionType) -> list[Any]:
    try:
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
    except ValueError:  # one has no value yet
        raise _UnknownError from None
    return [cells, function.__defaults__, function.__kwdefaults__]


def _fields(value: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    try:
        return dict(vars(value))
    except TypeError:
        raise _UnknownError from None


def _source(code: Any) -> str:
    """The source of the module that a function or class is in."""
    try:
        text = inspect.getsource(inspect.getmodule(code) or code)
    except (OSError, TypeError):
        raise _UnknownError from None
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _describe(value: Any) -> str:
    """A text that is the same for equal values in every process.

    Raises:
        _UnknownError: If there is none.
    """
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return repr(value)
    if isinstance(value, os.PathLike):
        return f"path {str(Path(value))!r}"
    if isinstance(value, re.Pattern):
        return f"pattern {value.pattern!r} {value.flags}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(sorted(f"{_describe(key)}: {_describe(each)}" for key, each in value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_describe, value)) + "]"
    if isinstance(value, (set, frozenset)):
        return "set " + ", ".join(sorted(map(_describe, value)))
    if callable(value) or isinstance(value, Identified) or (dataclasses.is_dataclass(value)):
        return _state(value)
    raise _UnknownError
