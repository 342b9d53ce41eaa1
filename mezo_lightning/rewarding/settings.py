"""One reward function with all that can be said about it: what stands in a configuration where a path is not enough."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

ConventionName = Literal["trl", "verl", "verl_batch", "openrlhf", "verifiers", "verifiers_group", "es", "prime"]


@dataclass(frozen=True)
class Reward:
    """A reward function of any convention, and how to call it."""

    function: str | Callable[..., Any]
    """its import path (rewards.squad.f1), a file and a name (my/file.py:score), a class_path with init_args, the folder
    or Hub id of a reward model, or the address of a server"""
    reward_kwargs: dict[str, Any] = field(default_factory=dict)
    """arguments that are the same in every call; for a class, or a function that makes the reward, its arguments"""
    convention: ConventionName | None = None
    """how the function is called; null: as its parameters say"""
    columns: dict[str, str] = field(default_factory=dict)
    """which column (or prompt, completion) an argument gets, where the names differ: {solution: answer}"""
    per_sample: bool | None = None
    """whether a row's value depends on that row alone, so that it may be remembered; null: as the reward says"""
    timeout: float | None = None
    """seconds that a call may take before it is ended as failed; plain functions then run in a process of their own"""
    version: str | None = None
    """takes the place of the hash of the source in the key of remembered answers: change it when the reward changes"""
    on_failure: Literal["mask", "raise"] | None = None
    """what a failure does: leave its sample out of the step, or end the run; null: mask if the reward is remote"""
    name: str | None = None
    """what logs call it; null: the function's name"""
    conversational: bool = False
    """show prompts and completions as lists of one message, {role, content}, which many rewards for chat models want"""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not (isinstance(self.function, str) or callable(self.function)):
            raise ValueError(f"reward holds {self.function!r}, which is neither a function nor an import path.")
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ValueError(f"timeout={self.timeout} must be a positive number of seconds, or null.")
        if self.on_failure not in ("mask", "raise", None):
            raise ValueError(f"on_failure={self.on_failure!r} must be 'mask', 'raise' or null.")
