"""The evaluator for loss objectives: one leaf module at a time, perturbed into a scratch buffer by forward hooks.

It takes hardly more memory than a forward: of linear layers and embeddings, which hold nearly all weights, a few rows
at a time; of other modules the largest, once. A module whose weights are used outside of its own forward cannot be
served this way, and is refused rather than left unperturbed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mezo_lightning.evaluators import Evaluator, Samples
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.outside_use import ADVICE, OutsideUse
from mezo_lightning.parameters import ParameterSpace, Slice
from mezo_lightning.samplers import chunk_numel
from mezo_lightning.steps import Point

if TYPE_CHECKING:
    from mezo_lightning.lockstep import Lockstep

_SPARED = 8
"""Two runs in lockstep part where a layer gives more numbers than this part of all weights."""


class _Product(NamedTuple):
    """What a linear layer is to do."""

    module: nn.Linear
    input: Tensor
    dtype: torch.dtype | None
    """Of its output, if not that of weights and input."""


class LeafScratch(Evaluator):
    """Each module's own parameters are perturbed into a scratch buffer just while that module runs.

    The master weights are only ever read. Embeddings are perturbed in the rows that a batch looks up, and linear layers
    in blocks of rows, each used while it is still in the cache.

    Args:
        model: The module whose submodules hold the parameters of ``space``.
        space: The trainable parameters, all of them held whole by this process.
        lockstep: Run the objective at the two points of a pair, theta + c z and theta - c z, by turns, from one linear
            layer to the next, so that z is made once for both: a third less work beside the forwards of a step
            (`lockstep.py`, needs `greenlet`). The values are the same. The objective must not draw random numbers, nor
            change anything that its next call would find changed. Not done where a module that has parameters of its
            own runs others within its forward; and where a layer's output is large, above an eighth of the trainable
            weights, the runs part, for the memory of a forward is to do.
        min_valid_fraction: See ``Evaluator``.
    """

    def __init__(
        self, model: nn.Module, space: ParameterSpace, *, lockstep: bool = False, min_valid_fraction: float = 0.5
    ):
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
        self._lockstep = lockstep and len(self._leaves) == len(self._owners)
        # One leaf runs at a time, so that all leaves share one buffer.
        size = max(
            (_nbytes(self._owners[m]) for m in self._leaves if m not in self._lookups and m not in self._linears),
            default=0,
        )
        self._scratch = torch.empty(size, dtype=torch.uint8, device=space.device)
        self._scratch_user: nn.Module | None = None
        self._blocks = {module: _rows_at_once(module, chunk_numel(space.device)) for module in self._linears}
        size = max((_nbytes([w]) // m.out_features * self._blocks[m] for m, (w, _) in self._linears.items()), default=0)
        points = 2 if self._lockstep else 1
        self._block = torch.empty(-(-points * size // 4) * 4, dtype=torch.uint8, device=space.device)
        self._runs: Lockstep[_Product, Tensor, Samples] | None = None
        self._masters: dict[int, tuple[Tensor, Tensor]] = {}
        self._users: Counter[int] = Counter()  # modules that are running, for each parameter: they may be nested
        self._unused = set(self._names.values())
        self._checked = False
        self._point = Point()

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        with self._hooked():
            for point in points:
                self._point = point
                with nullcontext() if self._checked else OutsideUse(self._names, self._users):
                    yield point
                self._check_all_used()
                self._release()

    def _measure(
        self, points: Sequence[Point], objective: Callable[[], Samples], interruptible: AbstractContextManager[None]
    ) -> Iterator[Samples]:
        if not (self._lockstep and self._checked):
            yield from super()._measure(points, objective, interruptible)
            return
        with self._hooked():
            for pair in _pairs(points):
                self._point = pair[0]
                with interruptible:
                    samples = (objective(),) if len(pair) == 1 else self._in_lockstep(pair, objective)
                yield from samples
                self._release()

    def _in_lockstep(self, pair: Sequence[Point], objective: Callable[[], Samples]) -> tuple[Samples, ...]:
        from mezo_lightning.lockstep import Lockstep

        def turn(run: int) -> None:
            self._point = pair[run]

        def serve(products: dict[int, _Product]) -> list[Tensor]:
            return self._products([(pair[run], product) for run, product in products.items()])

        self._runs = Lockstep(objective, serve, self._are_for_both, turn)
        try:
            return self._runs()
        finally:
            self._runs = None

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        """Within this, each module runs at ``self._point``."""
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
            yield
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
            self.space.perturb(piece, [(self._point, weights[: len(piece)])])
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
        """The forward of a linear layer at the point."""
        weight, _ = self._linears[module]
        if module.weight is not weight.parameter:  # another one stands in for it, as in functional_call
            return F.linear(input, module.weight, module.bias)
        # Products into a buffer are not autocast.
        kind = input.device.type
        product = _Product(module, input, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        return self._products([(self._point, product)])[0] if self._runs is None else self._runs.ask(product)

    def _products(self, products: Sequence[tuple[Point, _Product]]) -> list[Tensor]:
        """What a linear layer gives at some points, a block of rows of its weight at a time."""
        module, dtype = products[0][1].module, products[0][1].dtype
        weight, bias = self._linears[module]
        own = [weight] if bias is None else [weight, bias]
        self._unused.difference_update(piece.info.name for piece in own)
        self._users.update(id(piece.parameter) for piece in own)
        points = [point for point, _ in products]
        offsets = self._offsets(module.bias, bias, points)
        inputs = [product.input for _, product in products]
        if self._blocks[module] == module.out_features:
            blocks = self._rows(weight, range(module.out_features), points)
            outputs = list(map(F.linear, inputs, blocks, offsets))
        else:
            outputs = self._by_blocks(module, weight, points, inputs, offsets, dtype)
        self._users.subtract(id(piece.parameter) for piece in own)
        return outputs

    def _by_blocks(
        self,
        module: nn.Linear,
        weight: Slice,
        points: Sequence[Point],
        inputs: Sequence[Tensor],
        offsets: Sequence[Tensor | None],
        dtype: torch.dtype | None,
    ) -> list[Tensor]:
        flats = [input.reshape(-1, module.in_features).to(dtype) for input in inputs]
        outputs = [flat.new_empty(flat.shape[0], module.out_features) for flat in flats]
        offsets = [None if offset is None else offset.to(dtype) for offset in offsets]
        for first in range(0, module.out_features, self._blocks[module]):
            rows = range(module.out_features)[first : first + self._blocks[module]]
            blocks = self._rows(weight, rows, points)
            for flat, output, offset, block in zip(flats, outputs, offsets, blocks, strict=True):
                part, block = output[:, rows.start : rows.stop], block.t().to(dtype)
                if offset is None:
                    torch.mm(flat, block, out=part)
                else:
                    torch.addmm(offset[rows.start : rows.stop], flat, block, out=part)
        return [output.view(*input.shape[:-1], -1) for output, input in zip(outputs, inputs, strict=True)]

    def _offsets(self, master: Tensor | None, bias: Slice | None, points: Sequence[Point]) -> Sequence[Tensor | None]:
        """A linear layer's bias at some points."""
        if bias is None or id(bias.parameter) in self._masters:
            return [master] * len(points)
        offsets = [torch.empty_like(bias.parameter.data) for _ in points]
        self.space.perturb(bias, list(zip(points, offsets, strict=True)))
        return offsets

    def _rows(self, weight: Slice, rows: range, points: Sequence[Point]) -> Sequence[Tensor]:
        """Some rows of a matrix at some points, until the next ones are asked for."""
        if id(weight.parameter) in self._masters:  # a module around this one has the same weight, at the point already
            return [weight.parameter.data[rows.start : rows.stop]] * len(points)
        width = weight.info.shape[1]
        blocks = self._block.view(weight.parameter.dtype)[: len(points) * len(rows) * width].chunk(len(points))
        self.space.perturb(weight, list(zip(points, blocks, strict=True)), rows.start * width)
        return [block.view(len(rows), width) for block in blocks]

    def _are_for_both(self, product: _Product, other: _Product) -> bool:
        """Whether two products are of the same layer, and the room for both outputs can be spared."""
        large = product.input.numel() // product.module.in_features * product.module.out_features
        return product.module is other.module and product.dtype == other.dtype and large * _SPARED <= self.space.numel

    def _check_all_used(self) -> None:
        if len(self._unused) == len(self._names):
            return  # nothing has run: a process may have no rows of a batch
        self._checked = True
        if self._unused:
            names = sorted(self._unused)
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"{len(names)} trainable parameters were not used by the forward of the module that holds them "
                f"({some}): LeafScratch cannot perturb them; {ADVICE}"
            )


def _pairs(points: Sequence[Point]) -> Iterator[tuple[Point, ...]]:
    """Points one by one, or by two where the next one lies along the same direction."""
    at = 0
    while at < len(points):
        seeds = [[seed for seed, _ in point.terms] for point in points[at : at + 2]]
        count = 2 if len(seeds) == 2 and seeds[0] == seeds[1] and len(seeds[0]) == 1 else 1
        yield tuple(points[at : at + count])
        at += count


def _nbytes(slices: Sequence[Slice]) -> int:
    """The bytes of some slices, each rounded up to whole fp32 numbers."""
    return sum(-(-len(piece) * piece.parameter.element_size() // 4) * 4 for piece in slices)


def _shares_memory(output: Any, buffer: Tensor) -> bool:
    """Whether a module returned its weights, or a view of them."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    storage = buffer.untyped_storage().data_ptr()
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == storage for part in outputs)


def _rows_at_once(module: nn.Linear, limit: int) -> int:
    """Rows of a linear layer's weight in a block: blocks are of one size and hold up to ``limit`` numbers."""
    blocks = -(-module.weight.numel() // limit)
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
