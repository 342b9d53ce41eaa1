"""Reward functions by name: an import path, a function in a file, a reward model, a server."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import operator
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mezo_lightning.rewarding.answers import short

_FILE_DEFAULTS = ("compute_score", "reward_func")  # what verl and OpenRLHF look for in a file
_EXAMPLE = "write the import path of a function, such as rewards.squad.f1, or folder/file.py:function"


def imported(path: str) -> Callable[..., Any]:
    """The callable that a text stands for.

    Args:
        path: ``package.module.function``, ``package.module:function`` or ``folder/file.py:function`` (the file alone is
            enough for verl's ``compute_score`` and OpenRLHF's ``reward_func``); a folder or an id (``owner/name``) of a
            sequence classifier, which becomes a reward model; the address of a server in OpenRLHF's protocol.

    Raises:
        ValueError: If there is no such thing, or it cannot be called.
    """
    if path.startswith(("http://", "https://")):
        return _built("rewards.http", "HTTPReward", path)
    if _is_model(path):
        return _built("rewards.reward_model", "RewardModel", path)
    found = _found(*_split(path), path)
    if not callable(found):
        raise ValueError(f"reward={path!r} is {short(found)}, which cannot be called.")
    return found


def importable(path: str) -> str | None:
    """The path by which another process finds the same function; None for what is no path."""
    if path.startswith(("http://", "https://")) or _is_model(path):
        return None
    module, name = _split(path)
    if not module.endswith(".py"):
        return path
    name = name or _default_name(_loaded(module, path), path)
    return f"{Path(module).expanduser().resolve()}:{name}"


def path_of(function: Callable[..., Any]) -> str | None:
    """The path by which another process finds this very function; None where it would not."""
    if not isinstance(function, types.FunctionType) or function.__module__ not in sys.modules:
        return None
    module, name = sys.modules[function.__module__], function.__qualname__
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:  # it was defined inside of another function
        return None
    if found is not function or module.__name__ == "__main__":
        return None
    file = loaded_from(module)
    return f"{module.__name__}:{name}" if file is None else f"{file}:{name}"


def loaded_from(module: types.ModuleType) -> Path | None:
    """The file that ``imported`` loaded as this module; None for one that was imported by its name."""
    origin = module.__spec__.origin if module.__spec__ is not None else None
    return Path(origin) if origin and module.__name__ == _module_name(Path(origin)) else None


def _is_model(path: str) -> bool:
    """Whether this names a folder, or an id on the Hub, and no code."""
    if ":" in path or path.endswith(".py"):
        return False
    if "/" not in path or Path(path).expanduser().is_dir():
        return Path(path).expanduser().is_dir()
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ValueError(f"reward={path!r} is no folder of a reward model; or {_EXAMPLE}.")
    return True


def _split(path: str) -> tuple[str, str]:
    """Module (or file) and name in it."""
    if path.endswith(".py"):
        return path, ""
    module, _, name = path.rpartition(":" if ":" in path else ".")
    return module, name


def _found(module: str, name: str, path: str) -> Any:
    if module.endswith(".py"):
        found: Any = _loaded(module, path)
        name = name or _default_name(found, path)
    else:
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            raise ValueError(f"reward={path!r}: {error}. Is it installed, or its folder on PYTHONPATH?") from error
        except ValueError as error:
            raise ValueError(f"reward={path!r}: {_EXAMPLE}.") from error
    try:
        return operator.attrgetter(name)(found)
    except AttributeError as error:
        raise ValueError(f"reward={path!r}: {error}; {_EXAMPLE}.") from error


def _default_name(module: types.ModuleType, path: str) -> str:
    names = [name for name in _FILE_DEFAULTS if name in vars(module)]
    if len(names) != 1:
        raise ValueError(f"reward={path!r}: say which function of the file is meant, {path}:function.")
    return names[0]


def _loaded(file: str, path: str) -> types.ModuleType:
    """The module in a file, loaded once; no other file is run."""
    source = Path(file).expanduser().resolve()
    if not source.is_file():
        raise ValueError(f"reward={path!r}: there is no file {str(source)!r}.")
    name = _module_name(source)
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(
            f"reward={path!r}: the file cannot be loaded by itself, outside of any package, {type(error).__name__}: "
            f"{error}."
        ) from error
    return module


def _module_name(source: Path) -> str:
    # Two files of one name may be in use, and none may pass for an installed module.
    return f"{source.stem}_{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:12]}"


def _built(module: str, name: str, argument: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(module), name)(argument)
