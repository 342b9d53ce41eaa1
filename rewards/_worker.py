"""What runs in a process of its own when a reward has a time limit: the reward is found by its import path and called.

The process starts with this file and the reward's own module, and with nothing of whoever asks.
"""

import functools
import importlib
import importlib.util
import os
import pickle
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any


def prepare(path: str) -> None:
    """Import the reward before any clock runs; if that fails, the first call says so.

    Args:
        path: See ``call``.
    """
    try:
        _find(path)
    except Exception:
        return


def call(path: str, arguments: Mapping[str, Any], listeners: Collection[str] = ()) -> bytes:
    """What a reward returns, or the exception that it raises, and what it says meanwhile, pickled.

    Args:
        path: Where the reward is: ``package.module.function``, ``package.module:function`` or
            ``folder/file.py:function``.
        arguments: Its arguments by name.
        listeners: Names of further arguments, functions that it may call; with what, is said to whoever asks, as
            (name, positional arguments, arguments by name).
    """
    said: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def listener(name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: said.append((name, args, kwargs))

    try:
        value = _find(path)(**arguments, **{name: listener(name) for name in listeners})
        return pickle.dumps((value, said))
    except Exception as error:
        return pickle.dumps((_portable(error), []))


def _portable(error: Exception) -> Exception:
    """An exception that can be pickled and read again: many have arguments of their own, which pickle loses."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@functools.cache
def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(":" if ":" in path else ".")
    found: Any = _loaded(module) if module.endswith(".py") else importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def _loaded(file: str) -> Any:
    """The module in a file, wherever it is."""
    name = f"reward_in_{os.path.splitext(os.path.basename(file))[0]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    spec.loader.exec_module(module)
    return module
