"""Refusing what an evaluator that perturbs weights module by module could not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

ADVICE = "use the evaluator Copy (in YAML: evaluator: copy), or freeze it"


class OutsideUse(TorchFunctionMode):
    """Refuses a computation on a master weight while no module that holds it is running: it would be unperturbed.

    It watches the first evaluation only, for it costs a little at every operation.
    """

    def __init__(self, names: Mapping[int, str], users: Counter[int]):
        super().__init__()
        self._names = names
        self._users = users

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        # Its dtype, shape or device may be asked for, and whether it is trainable may be switched.
        if func is not Tensor.requires_grad_ and any(isinstance(part, Tensor) for part in flat(result)):
            for value in flat((args, kwargs or {})):
                if id(value) in self._names and not self._users[id(value)]:
                    raise ValueError(
                        f"the parameter {self._names[id(value)]!r} is used outside of the forward of the module that "
                        f"holds it: LeafScratch cannot perturb it there; {ADVICE}"
                    )
        return result


def flat(values: Any) -> Iterator[Any]:
    """What is in a nest of tuples, lists and dictionaries."""
    if isinstance(values, (tuple, list)):
        for value in values:
            yield from flat(value)
    elif isinstance(values, Mapping):
        yield from flat(list(values.values()))
    else:
        yield values
