"""An evaluator that runs each row of a batch along a direction of its own, in one forward of the whole batch.

The weights stay as they are. It watches operations, not modules: one that takes a trainable parameter gives, for row b,
what it would give at ``theta + epsilon z_b`` (``operations.py``), and whatever else is computed from a trainable
parameter is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from mezo_lightning.evaluators import Compare, Evaluate, Evaluator, Samples
from mezo_lightning.flipout import Flipout
from mezo_lightning.outside_use import flat
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.rowwise.operations import OPERATIONS, RowDirections
from mezo_lightning.rowwise.points import RowPoint, row_seed, rows_that_run
from mezo_lightning.steps import Point

_ADVICE = "use another estimator than GRZO, or freeze it"


class Rowwise(Evaluator):
    """Each row of a batch sees weights of its own; points at which all rows see the same are left to another evaluator.

    The first dimension of the model's input must be the rows of the batch, in their order, or as declared with
    ``points.running``: the batch may then be run in parts, and a row may be several sequences. Within the model too
    the rows must come first, or rows and tokens in one dimension, rows outermost; what else goes unseen. Beside what
    a forward takes, this needs the direction of one parameter at a time, another copy of each layer's output, and a
    byte a row of the batch for every row and column of every parameter.

    Args:
        model: The module whose submodules hold the parameters of ``space``.
        space: The trainable parameters, all of them held whole by this process, with the sampler ``Flipout``.
        plain: Serves the other points.
        min_valid_fraction: See ``Evaluator``.

    Raises:
        ValueError: If the sampler is another one.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, plain: Evaluator, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        if not isinstance(space.sampler, Flipout):
            raise ValueError(f"Rowwise needs the sampler Flipout, not {type(space.sampler).__name__}")
        self._plain = plain
        self._directions = space.sampler.bind(space.table)
        self._slices = {id(piece.parameter): piece for piece in space.slices}
        # PEFT's generate goes past the outermost module: any that holds all of the parameters will do.
        self._models = [m for m in model.modules() if self._slices.keys() <= {id(p) for p in m.parameters()}]
        self._running = 0  # how many of them are, one within the other
        self._point: RowPoint | None = None
        self._rows: RowDirections | None = None
        self._signs: tuple[tuple[int, tuple[int, ...]], Tensor] | None = None
        self._seen: set[int] = set()
        self._declared = False
        self._unused = {piece.info.name for piece in space.slices}

    def __call__(self, objective: Callable[[], Samples | Tensor], compare: Compare | None = None) -> Evaluate:
        def checked() -> Samples | Tensor:
            result = objective()
            if self._point is not None:
                self._check_count(len(result.valid) if isinstance(result, Samples) else result.numel())
            return result

        return super().__call__(checked, compare)

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        if not any(isinstance(point, RowPoint) for point in points):
            with closing(self._plain.visit(points)) as visits:
                yield from visits
            return
        hooks = [m.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True) for m in self._models]
        hooks += [m.register_forward_hook(self._leave, always_call=True) for m in self._models]
        try:
            for point in points:
                assert isinstance(point, RowPoint), point
                self._point, self._running, self._declared = point, 0, False
                self._seen.clear()
                with _Watch(self):
                    yield point
                self._check_all_used()
        finally:
            for hook in hooks:
                hook.remove()
            self._point = self._rows = self._signs = None

    # -- which rows run ------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._running += 1
        if self._running > 1:
            return
        size, tokens = _size_of_input(args, kwargs)
        rows = rows_that_run()
        self._declared = rows is not None
        if rows is None:
            rows = tuple(range(size))
            if self._seen and len(self._seen) != size:
                raise ValueError(
                    f"the model runs on {size} rows, and ran on {len(self._seen)} before at the same point: which rows "
                    "of the batch are they? Run all of them at once, or "
                    "declare them with mezo_lightning.rowwise.points.running"
                )
        if len(rows) != size:
            raise ValueError(
                f"{type(module).__name__} runs on {size} rows, but {len(rows)} were declared: what all rows share, "
                f"such as a prefix or a prompt of virtual tokens, cannot have directions of their own; {_ADVICE}"
            )
        self._seen.update(rows)
        assert self._point is not None
        number, far = self.space.step_number(), self._point.coefficient
        self._rows = RowDirections(self._directions, number, self._slices, self._signs_of(rows), far, tokens)

    def _leave(self, *_: Any) -> None:
        self._running -= 1
        if not self._running:
            self._rows = None

    def _signs_of(self, rows: tuple[int, ...]) -> Tensor:
        """The signs of these rows' directions, kept for the next token, and for the other side of theta."""
        assert self._point is not None
        key = (self._point.seed, rows)
        if self._signs is None or self._signs[0] != key:
            unique = list(dict.fromkeys(rows))
            signs = self._directions.signs([row_seed(self._point.seed, row) for row in unique], self.space.device)
            self._signs = (key, signs if len(unique) == len(rows) else signs[[unique.index(row) for row in rows]])
        return self._signs[1]

    def _check_count(self, count: int) -> None:
        """Whether the values that came out can be those of the rows that went in."""
        if self._declared:
            assert max(self._seen) < count, (self._seen, count)
        elif self._seen and len(self._seen) != count:
            raise ValueError(
                f"the objective gave {count} values, but the model ran on {len(self._seen)} rows: with a direction for "
                "each row (GRZO) every row needs a value, in the order in which the rows run, unless their order is "
                "declared with mezo_lightning.rowwise.points.running"
            )

    # -- what is computed from the parameters --------------------------------------------------------------------------

    def operate(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run an operation; where it takes trainable parameters, for each row at its weights.

        Raises:
            ValueError: If rows cannot have weights of their own in it.
        """
        names = [self._slices[id(value)].info.name for value in flat((args, kwargs)) if id(value) in self._slices]
        if not names:
            return function(*args, **kwargs)
        why = f"is used in {resolve_name(function) or function}"
        if self._rows is not None and function in OPERATIONS:
            try:
                result = OPERATIONS[function](self._rows, *args, **kwargs)
            except ValueError as error:
                result, why = None, str(error)
            if result is not None:
                self._unused.difference_update(names)
                return result
        else:
            result = function(*args, **kwargs)
            if function is Tensor.requires_grad_ or not any(isinstance(value, Tensor) for value in flat(result)):
                return result  # its dtype, shape or device was asked for, or whether it is trainable was switched
            if self._rows is None:
                why += " outside of the model's forward"
        some = " and ".join(map(repr, names))
        raise ValueError(f"the parameter {some} {why}: rows cannot have directions of their own there; {_ADVICE}")

    def _check_all_used(self) -> None:
        if self._seen and self._unused:
            names = sorted(self._unused)
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{len(names)} trainable parameters had no part in the model's forward ({some}), so that rows cannot "
                f"have directions of their own there; {_ADVICE}"
            )


class _Watch(TorchFunctionMode):
    """Sees every operation while an objective is measured at a point."""

    def __init__(self, evaluator: Rowwise):
        super().__init__()
        self._evaluator = evaluator

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        del types
        return self._evaluator.operate(func, args, kwargs or {})


def _size_of_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """How many rows a model's input has, and how many elements, or vectors where it is not of ids."""
    named = [kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None]
    tensors = [value for value in (*named, *args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
    if not tensors:
        raise ValueError("the model's forward takes no tensor: which rows of the batch it runs on cannot be known")
    first = tensors[0]
    return len(first), first.shape[:-1].numel() if first.is_floating_point() else first.numel()
