"""Values of an objective at a set of points, leaving no trace in the weights.

An estimator asks for all the points of a round at once; an evaluator decides how the model takes on the weights of
each. It never knows which rule is asking, and the estimator never sees model, batch or reward.

=================  ===================================================  ==============================================
evaluator          working weights                                      extra memory
=================  ===================================================  ==============================================
``Copy``           the whole model at one point at a time, restored     one copy of the trainable weights
                   from a copy
``LeafScratch``    one leaf module at a time, perturbed into a scratch  the largest leaf module
                   buffer by forward hooks
=================  ===================================================  ==============================================

``Copy`` suits any module, and generation, where ``LeafScratch`` would make the noise again for every token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.parameters import ParameterSpace, Slice
from mezo_lightning.steps import Point


@dataclass(frozen=True)
class Samples:
    """What an objective returns for a batch of N samples at the current weights."""

    values: Tensor
    """[N, C]: the components of each sample's objective, already weighted, to be minimised and summed."""
    valid: Tensor
    """bool [N, C]: False where a component has no value; a failed sample has none at all."""
    completions: tuple[str, ...] | None = None
    """What the model wrote, if it was asked to write."""
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    """[N] each, NaN where there is none: what else is worth a log."""

    @staticmethod
    def of(values: Tensor) -> Samples:
        """Samples with one component that is always valid, from values [N] or a scalar."""
        values = values.reshape(-1, 1)
        return Samples(values, torch.ones_like(values, dtype=torch.bool))

    @staticmethod
    def concatenate(parts: Sequence[Samples]) -> Samples:
        """The samples of several micro-batches as those of one batch."""
        if len(parts) == 1:
            return parts[0]
        texts = [part.completions for part in parts]
        return Samples(
            torch.cat([part.values for part in parts]),
            torch.cat([part.valid for part in parts]),
            None if texts[0] is None else tuple(text for some in texts for text in some or ()),
            {name: torch.cat([part.metrics[name] for part in parts]) for name in parts[0].metrics},
        )


@dataclass(frozen=True)
class Evaluation:
    """The values of one round: what was measured at each of P points, over the samples that all of them share.

    Masking is paired: a component without a value at one point is left out at all points, and a sample without any
    component left does not count at all. A failure can therefore never look like a difference between points.
    """

    points: tuple[Point, ...]
    samples: tuple[Samples, ...]
    values: Tensor
    """fp64 [P, N]; 0 where a sample does not count."""
    valid: Tensor
    """bool [N]: which samples count."""
    skip_reason: str | None
    """Why no estimate may be made from these values, if so."""

    @staticmethod
    def of(points: Sequence[Point], samples: Sequence[Samples], min_valid_fraction: float) -> Evaluation:
        """Mask and check the samples that were measured at each point."""
        values = torch.stack([part.values.detach() for part in samples]).to("cpu", torch.float64)
        shared = torch.stack([part.valid for part in samples]).all(0).cpu()
        valid = shared.any(-1)
        values = values.masked_fill(~shared, 0.0).sum(-1)
        count, total = int(valid.sum()), valid.numel()
        reason = None
        if count == 0 or count < min_valid_fraction * total:
            reason = f"{count} of {total} samples have a value at every point, fewer than {min_valid_fraction:.0%}"
        elif not bool(values.isfinite().all()):
            worst = points[int((~values.isfinite()).any(-1).nonzero()[0])]
            reason = f"the objective is not finite at point {worst.label}"
        return Evaluation(tuple(points), tuple(samples), values, valid, reason)

    @property
    def means(self) -> list[float]:
        """The objective at each point: the mean over the samples that count, summed exactly."""
        count = int(self.valid.sum())
        return [math.fsum(row) / count if count else math.nan for row in self.values.tolist()]

    def tie_fraction(self, pairs: Sequence[tuple[int, int]]) -> float:
        """The share of samples that count whose values at the two points of a pair are the same."""
        if not pairs or not self.valid.any():
            return math.nan
        equal = torch.stack([self.values[i, self.valid] == self.values[j, self.valid] for i, j in pairs])
        return float(equal.double().mean())

    def identical_fraction(self, pairs: Sequence[tuple[int, int]]) -> float:
        """The share of samples with the same completion at the two points of a pair; NaN where none are written."""
        texts = [part.completions for part in self.samples]
        same = [a == b for i, j in pairs for a, b in zip(texts[i] or (), texts[j] or (), strict=True)]
        return sum(same) / len(same) if same else math.nan


Evaluate = Callable[[Sequence[Point]], Evaluation]
"""Ask for the values of a round of points."""


class Evaluator(ABC):
    """Evaluates objectives at points; the weights are byte-equal before and after, whatever happens in between.

    Args:
        space: The trainable parameters.
        min_valid_fraction: With fewer samples than this left after masking, no estimate is made from a round.
    """

    def __init__(self, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        if not 0.0 <= min_valid_fraction <= 1.0:
            raise ValueError(f"min_valid_fraction={min_valid_fraction} must be between 0 and 1")
        self.space = space
        self.min_valid_fraction = min_valid_fraction

    @abstractmethod
    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        """Give the model the weights of each point in turn; theta again when closed or exhausted."""

    def __call__(self, objective: Callable[[], Samples | Tensor]) -> Evaluate:
        """Bind an objective.

        Args:
            objective: Runs the model and returns ``Samples``, or a tensor of per-sample values [N] or a scalar, to
                be minimised. It is called once a point, without gradients.
        """

        def evaluate(points: Sequence[Point]) -> Evaluation:
            samples = []
            with (
                torch.inference_mode(),
                uninterrupted() as interruptible,
                closing(self.visit(points)) as visits,
            ):
                for _ in visits:
                    with interruptible:
                        result = objective()
                    samples.append(result if isinstance(result, Samples) else Samples.of(result))
            return Evaluation.of(points, samples, self.min_valid_fraction)

        return evaluate


class Copy(Evaluator):
    """The whole model at one point at a time, restored by copying: any module, any use of its weights."""

    def __init__(self, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        self._saved: list[Tensor] | None = None

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        with torch.inference_mode(False):
            self._saved = self.space.save(self._saved)
        try:
            for point in points:
                self.space.move_to(point, self._saved)
                yield point
        finally:
            with uninterrupted():
                self.space.restore(self._saved)


class LeafScratch(Evaluator):
    """Each module's own parameters are perturbed into a scratch buffer just while that module runs.

    The master weights are only ever read. Embeddings are perturbed in the rows that a batch looks up.

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
        self._lookups = {module for module in self._owners if _is_plain_lookup(module)}
        self._leaves = {m for m in self._owners if not any(c in self._owners for c in m.modules() if c is not m)}
        # One leaf runs at a time, so that all leaves share one buffer.
        size = max((_nbytes(self._owners[m]) for m in self._leaves if m not in self._lookups), default=0)
        self._scratch = torch.empty(size, dtype=torch.uint8, device=space.device)
        self._scratch_user: nn.Module | None = None
        self._masters: dict[int, tuple[Tensor, Tensor]] = {}
        self._users: Counter[int] = Counter()  # modules that are running, for each parameter: they may be nested
        self._unused = {piece.info.name for piece in space.slices}
        self._point = Point()

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        hooks = []
        # Around all other hooks: those may compute from the weights, or change the output.
        for module in self._owners:
            if module in self._lookups:
                hooks.append(module.register_forward_hook(self._look_up, prepend=True, with_kwargs=True))
            else:
                hooks.append(module.register_forward_pre_hook(self._enter, prepend=True))
                hooks.append(module.register_forward_hook(self._leave))
        try:
            for point in points:
                self._point = point
                yield point
                self._check_all_used()
                self._release()
        finally:
            with uninterrupted():
                for hook in hooks:
                    hook.remove()
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
        if module in self._leaves and self._scratch_user is None:
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
            self.space.perturb(piece, self._point, weights)
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

    def _look_up(
        self, module: nn.Module, args: tuple[Tensor, ...], kwargs: Mapping[str, Tensor], output: Tensor
    ) -> Tensor:
        [piece] = self._owners[module]
        self._unused.discard(piece.info.name)
        if not self._point.terms:
            return output
        rows, inverse = (args[0] if args else kwargs["input"]).unique(return_inverse=True)
        return self.space.perturbed_rows(piece, rows, self._point)[inverse]

    def _check_all_used(self) -> None:
        if self._unused:
            names = sorted(self._unused)
            raise ValueError(
                f"{len(names)} trainable parameters were not used by the forward of the module that holds them "
                f"({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): LeafScratch cannot perturb them; "
                "use the evaluator Copy (in YAML: evaluator: copy), or freeze them"
            )


def _nbytes(slices: Sequence[Slice]) -> int:
    """The bytes of some slices, each rounded up to whole fp32 numbers."""
    return sum(-(-len(piece) * piece.parameter.element_size() // 4) * 4 for piece in slices)


def _shares_memory(output: Any, buffer: Tensor) -> bool:
    """Whether a module returned its weights, or a view of them."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    storage = buffer.untyped_storage().data_ptr()
    return any(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == storage for part in outputs)


def _is_plain_lookup(module: nn.Module) -> bool:
    """Whether a module does nothing but pick rows of its weight."""
    return isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward and module.max_norm is None
