"""The evaluator for loss objectives: one leaf module at a time, perturbed into a scratch buffer by forward hooks.

It takes hardly more memory than a forward: of linear layers and embeddings, which hold nearly all weights, a few rows
at a time; of other modules the largest, once. A module whose weights are used outside of its own forward cannot be
served this way, and is refused rather than left unperturbed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from mezo_lightning.evaluators import Evaluator
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.parameters import ParameterSpace, Slice
from mezo_lightning.samplers import chunk_numel
from mezo_lightning.steps import Point

_ADVICE = "use the evaluator Copy (in YAML: evaluator: copy), or freeze it"


class LeafScratch(Evaluator):
    """Each module's own parameters are perturbed into a scratch buffer just while that module runs.

    The master weights are only ever read. Embeddings are perturbed in the rows that a batch looks up, and linear layers
    in blocks of rows, each used while it is still in the cache.

    Args:
        model: The module whose submodules hold the parameters of ``space``.
        space: The trainable parameters, all of them held whole by this process.
        min_valid_fraction: See ``Evaluator``.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        slices = {id(piece.parameter): piece for piece in space.slices}
        self._owners: dict[nn.Module, list[Slice]] = {}
        for module in model.modules():
            own = [slices[id(p)] for p in module.parameters(recurse=False) if id(p) in slices]
            if own:
                self._owners[module] = own
        self._names = {id(piece.parameter): piece.info.name for piece in space.slices}
        self._lookups = {module for module in self._owners if _is_plain_lookup(module)}
        self._linears = {
            module: (weight, bias)
            for module in self._owners
            if _is_plain_linear(module)
            for weight, bias in [(slices.get(id(module.weight)), slices.get(id(module.bias)))]
            if weight is not None
        }
        self._leaves = {m for m in self._owners if not any(c in self._owners for c in m.modules() if c is not m)}
        # One leaf runs at a time, so that all leaves share one buffer.
        size = max(
            (_nbytes(self._owners[m]) for m in self._leaves if m not in self._lookups and m not in self._linears),
            default=0,
        )
        self._scratch = torch.empty(size, dtype=torch.uint8, device=space.device)
        self._scratch_user: nn.Module | None = None
        self._blocks = {module: _rows_at_once(module, chunk_numel(space.device)) for module in self._linears}
        size = max((_nbytes([w]) // m.out_features * self._blocks[m] for m, (w, _) in self._linears.items()), default=0)
        self._block = torch.empty(-(-size // 4) * 4, dtype=torch.uint8, device=space.device)
        self._masters: dict[int, tuple[Tensor, Tensor]] = {}
        self._users: Counter[int] = Counter()  # modules that are running, for each parameter: they may be nested
        self._unused = set(self._names.values())
        self._checked = False
        self._point = Point()

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        hooks, patched = [], []
        # Around all other hooks: those may compute from the weights (not from those of linear layers), or change the
        # output.
        for module in self._owners:
            if module in self._linears and _is_plain_linear(module):
                patched.append(module)
                module.forward = partial(self._linear, module)
            elif module in self._lookups:
                hooks.append(module.register_forward_pre_hook(self._enter_lookup, prepend=True))
                hooks.append(module.register_forward_hook(self._look_up, prepend=True, with_kwargs=True))
            else:
                hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            for point in points:
                self._point = point
                with nullcontext() if self._checked else _OutsideUse(self._names, self._users):
                    yield point
                self._check_all_used()
                self._release()
        finally:
            with uninterrupted():
                for hook in hooks:
                    hook.remove()
                for module in patched:
                    vars(module).pop("forward", None)
                self._release()

    def _release(self) -> None:
        """Give back what modules left behind that did not end, because of an exception."""
        for parameter, master in self._masters.values():
            parameter.data = master
        self._masters.clear()
        self._users.clear()
        self._scratch_user = None

    def _enter(self, module: nn.Module, args: Any) -> None:
        del args
        own = self._owners[module]
        if module in self._leaves and module not in self._linears and self._scratch_user is None:
            self._scratch_user, scratch = module, self._scratch
        else:
            scratch = torch.empty(_nbytes(own), dtype=torch.uint8, device=self.space.device)
        for piece in own:
            parameter = piece.parameter
            self._unused.discard(piece.info.name)
            self._users[id(parameter)] += 1
            if not self._point.terms or id(parameter) in self._masters:
                continue
            weights, scratch = scratch[: _nbytes([piece])].view(parameter.dtype), scratch[_nbytes([piece]) :]
            self.space.perturb(piece, self._point, weights[: len(piece)])
            self._masters[id(parameter)] = (parameter, parameter.data)
            parameter.data = weights[: len(piece)].view(parameter.shape)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        del args
        for piece in self._owners[module]:
            key = id(piece.parameter)
            self._users[key] -= 1
            if not self._users[key] and key in self._masters:
                # An interrupt between the two must still find the master.
                piece.parameter.data = self._masters[key][1]
                del self._masters[key]
        if self._scratch_user is module:
            self._scratch_user = None
            if _shares_memory(output, self._scratch):
                self._scratch = torch.empty_like(self._scratch)

    def _enter_lookup(self, module: nn.Module, args: Any) -> None:
        del args
        [piece] = self._owners[module]
        self._unused.discard(piece.info.name)
        self._users[id(piece.parameter)] += 1

    def _look_up(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        [piece] = self._owners[module]
        if self._point.terms:
            rows, inverse = (args[0] if args else kwargs["input"]).unique(return_inverse=True)
            output = self.space.perturbed_rows(piece, rows, self._point)[inverse]
        self._users[id(piece.parameter)] -= 1
        return output

    def _linear(self, module: nn.Linear, input: Tensor) -> Tensor:
        """The forward of a linear layer at the point, a block of rows of its weight at a time."""
        weight, bias = self._linears[module]
        if module.weight is not weight.parameter:  # another one stands in for it, as in functional_call
            return F.linear(input, module.weight, module.bias)
        own = [weight] if bias is None else [weight, bias]
        self._unused.difference_update(piece.info.name for piece in own)
        self._users.update(id(piece.parameter) for piece in own)
        offset: Tensor | None = module.bias
        if bias is not None and id(bias.parameter) not in self._masters:
            offset = torch.empty(len(bias), dtype=bias.parameter.dtype, device=self.space.device)
            self.space.perturb(bias, self._point, offset)
        rows = self._blocks[module]
        if rows == module.out_features:
            output = F.linear(input, self._rows(weight, 0, rows), offset)
        else:
            # Products into a buffer are not autocast.
            kind = input.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            flat = input.reshape(-1, module.in_features).to(dtype)
            offset = None if offset is None else offset.to(dtype)
            output = flat.new_empty(flat.shape[0], module.out_features)
            for first in range(0, module.out_features, rows):
                part = output[:, first : first + rows]
                block = self._rows(weight, first, part.shape[1]).t().to(dtype)
                if offset is None:
                    torch.mm(flat, block, out=part)
                else:
                    torch.addmm(offset[first : first + rows], flat, block, out=part)
            output = output.view(*input.shape[:-1], module.out_features)
        self._users.subtract(id(piece.parameter) for piece in own)
        return output

    def _rows(self, weight: Slice, first: int, count: int) -> Tensor:
        """Some rows of a matrix at the point, until the next ones are asked for."""
        if id(weight.parameter) in self._masters:  # a module around this one has the same weight, at the point already
            return weight.parameter.data[first : first + count]
        width = weight.info.shape[1]
        rows = self._block.view(weight.parameter.dtype)[: count * width]
        self.space.perturb(weight, self._point, rows, first * width)
        return rows.view(count, width)

    def _check_all_used(self) -> None:
        if len(self._unused) == len(self._names):
            return  # nothing has run: a process may have no rows of a batch
        self._checked = True
        if self._unused:
            names = sorted(self._unused)
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{len(names)} trainable parameters were not used by the forward of the module that holds them "
                f"({some}): LeafScratch cannot perturb them; {_ADVICE}"
            )


class _OutsideUse(TorchFunctionMode):
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
                        f"holds it: LeafScratch cannot perturb it there; {_ADVICE}"
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


def _nbytes(slices: Sequence[Slice]) -> int:
    """The bytes of some slices, each rounded up to whole fp32 numbers."""
    return sum(-(-len(piece) * piece.parameter.element_size() // 4) * 4 for piece in slices)


def _shares_memory(output: Any, buffer: Tensor) -> bool:
    """Whether a module returned its weights, or a view of them."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    storage = buffer.untyped_storage().data_ptr()
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == storage for part in outputs)


def _rows_at_once(module: nn.Linear, limit: int) -> int:
    """Rows of a linear layer's weight in a block: blocks are of one size and hold about ``limit`` numbers."""
    blocks = max(1, round(module.weight.numel() / limit))
    return -(-module.out_features // blocks)


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module does nothing but multiply by its weight and add its bias."""
    return (
        isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and not any(module.children())
    )


def _is_plain_lookup(module: nn.Module) -> bool:
    """Whether a module does nothing but pick rows of its weight."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None
