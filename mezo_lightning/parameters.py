"""The flat vector of trainable parameters, and the slices of it that this process holds.

Positions are those of the *unsharded* model: the trainable parameters one after another, in the order in which they
were named, each in row-major order; tied parameters count once and frozen ones not at all. Whoever shards a model only
has to say which slices of the vector a rank holds; nothing else here changes.

Arithmetic is done in fp32 in chunks that stay in cache, each element rounded once per term and in the order of the
terms, whatever the chunks are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mezo_lightning.chunks import Chunk, plan
from mezo_lightning.dense import Dense
from mezo_lightning.fingerprints import fingerprint_of
from mezo_lightning.rounding import RoundingName, Store, fill_rounding_lanes, make_store
from mezo_lightning.samplers import Sampler, chunk_numel
from mezo_lightning.shards import Shard, whole_shape
from mezo_lightning.steps import DecayTowards, Point, Step


@dataclass(frozen=True)
class ParameterInfo:
    """One row of the parameter table: where a parameter lies in the flat vector of the unsharded model."""

    name: str
    shape: tuple[int, ...]
    start: int
    group: int

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Slice:
    """A piece of one parameter that this process holds: elements [begin, begin + numel) of the parameter."""

    info: ParameterInfo
    parameter: Tensor
    begin: int = 0
    numel: int = -1
    """Elements held; -1 for all."""

    def __len__(self) -> int:
        return self.info.numel if self.numel < 0 else self.numel

    @property
    def start(self) -> int:
        """The position of the slice's first element."""
        return self.info.start + self.begin

    @property
    def weights(self) -> Tensor:
        """The working weights, [numel], sharing storage with the parameter wherever that lies just now."""
        if isinstance(self.parameter, Shard):
            return self.parameter.data
        return self.parameter.data.view(-1)[self.begin : self.begin + len(self)]

    @staticmethod
    def of(info: ParameterInfo, parameter: Tensor) -> Slice:
        """All of a parameter that this process holds."""
        if isinstance(parameter, Shard):
            return Slice(info, parameter, parameter.begin, parameter.numel())
        return Slice(info, parameter)


class ParameterSpace:
    """The trainable parameters as one vector on which directions act.

    Args:
        slices: What this process holds, in the order of positions, all on one device; some may be empty.
        table: Every parameter of the unsharded model, in the order of positions.
        sampler: The distribution of directions.
        rounding: How updates get into 16-bit weights, see ``rounding.py``.
    """

    def __init__(
        self, slices: Sequence[Slice], table: Sequence[ParameterInfo], sampler: Sampler, rounding: RoundingName
    ):
        self.device = slices[0].parameter.device
        self.parameters = {piece.info.name: piece.parameter for piece in slices}
        """What was given for each name, also where it is an empty shard."""
        self.slices = tuple(piece for piece in slices if len(piece))
        self.table = tuple(table)
        self.sampler = sampler.settled(slices, self.table)
        self.step_number: Callable[[], int] = lambda: 0
        """Tells how many steps the run has made; whoever makes them sets it."""
        self.decay_towards: DecayTowards = "zero"
        """What weight decay is towards; whoever makes steps sets it, for the record."""
        self.start: list[Tensor] | None = None
        """Copies of all slices as they were before step 0, once there was one that decays towards them."""
        self.rule: Dense | None = None
        """The update rule that keeps dense moments, if there is one; whoever makes steps sets it, for the record."""
        self.moments: list[Tensor] | None = None
        """What it keeps beside each slice, fp32 [numel, moments], once there was a step."""
        self.rounding: RoundingName = rounding
        self.stores: tuple[Store, ...] = tuple(make_store(piece.weights, rounding) for piece in self.slices)
        size = min(chunk_numel(self.device), sum(map(len, self.slices)))
        self._chunks = tuple(plan(self.slices, chunk_numel(self.device)))
        self._values = torch.empty(size, dtype=torch.float32, device=self.device)
        self._direction = torch.empty(size, dtype=torch.float32, device=self.device)
        self._lanes = torch.empty(size, dtype=torch.int32, device=self.device)

    @classmethod
    def of(
        cls, named: Sequence[tuple[str, Tensor]], groups: Sequence[int], sampler: Sampler, rounding: RoundingName
    ) -> ParameterSpace:
        """The space of parameters that this process holds as a whole, or as shards.

        Args:
            named: (name, parameter) in the order of positions; a ``Shard`` stands for a parameter that is cut up.
            groups: The parameter group of each.
            sampler: The distribution of directions.
            rounding: How updates get into 16-bit weights.

        Raises:
            ValueError: If there is no parameter, or one is not contiguous, or they are on several devices.
        """
        if not named:
            raise ValueError("there is no trainable parameter: requires_grad is False for all of them")
        devices = {parameter.device for _, parameter in named}
        if len(devices) > 1:
            raise ValueError(
                f"the parameters are on several devices ({', '.join(sorted(map(str, devices)))}); move them to one"
            )
        table, start = [], 0
        for (name, parameter), group in zip(named, groups, strict=True):
            if not parameter.is_contiguous():
                raise ValueError(f"parameter {name!r} is not contiguous in memory; assign parameter.data.contiguous()")
            table.append(ParameterInfo(name, tuple(whole_shape(parameter)), start, group))
            start += table[-1].numel
        slices = [Slice.of(info, parameter) for info, (_, parameter) in zip(table, named, strict=True)]
        return cls(slices, table, sampler, rounding)

    @property
    def sampler(self) -> Sampler:
        """The distribution of directions, with all that it has to know of the weights that the run began with."""
        return self._sampler

    @sampler.setter
    def sampler(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._directions = sampler.bind(self.table)

    @property
    def numel(self) -> int:
        """The length of the unsharded vector."""
        return self.table[-1].start + self.table[-1].numel

    @torch.no_grad()
    def save(self, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Copy the working weights of every slice, into earlier copies where given."""
        if into is None:
            return [piece.weights.clone() for piece in self.slices]
        return [copy.copy_(piece.weights) for copy, piece in zip(into, self.slices, strict=True)]

    @torch.no_grad()
    def restore(self, saved: Sequence[Tensor]) -> None:
        """Put saved working weights back, bit for bit."""
        for copy, piece in zip(saved, self.slices, strict=True):
            piece.weights.copy_(copy)

    @torch.no_grad()
    def move_to(self, point: Point, saved: Sequence[Tensor]) -> None:
        """Make the working weights those of ``point``, where theta is ``saved``; rounded to nearest if 16-bit."""
        for chunk in self._chunks:
            values = self._values[: chunk.numel]
            for piece in chunk.pieces:
                values[piece.span] = saved[piece.slice][piece.begin : piece.end]
            active = self._active(chunk, saved)
            for seed, coefficient in point.terms:
                direction = self._fill(self._direction[: chunk.numel], seed, chunk.start, active)
                values.add_(direction, alpha=coefficient)
            for piece in chunk.pieces:
                self.slices[piece.slice].weights[piece.begin : piece.end] = values[piece.span]

    @torch.no_grad()
    def perturb(self, piece: Slice, targets: Sequence[tuple[Point, Tensor]], begin: int = 0) -> None:
        """Write a slice's weights at some points; the slice is not changed.

        Args:
            piece: One of ``slices``.
            targets: Points, and [n] in the weights' dtype for each, which receive elements [begin, begin + n) of the
                slice. A direction that one point begins with, where the point before it ends, is made once for both.
            begin: See ``targets``.
        """
        total, chunk = targets[0][1].numel(), self._values.numel()
        for at in range(0, total, chunk):
            source, made = piece.weights[begin + at : begin + min(at + chunk, total)], None
            direction = self._direction[: source.numel()]
            active = self._directions.active(piece.info, source)
            for point, out in targets:
                target = out[at : at + chunk]
                # fp32 sums are made where they are wanted: one more copy of all weights is felt at small batches.
                values = target if out.dtype == torch.float32 else self._values[: source.numel()].copy_(source)
                start = source if values is target else values
                for seed, coefficient in point.terms:
                    if seed != made:
                        self._fill(direction, seed, piece.start + begin + at, active)
                        made = seed
                    start = torch.add(start, direction, alpha=coefficient, out=values)
                if start is not target:
                    target.copy_(start)

    @torch.no_grad()
    def perturbed_rows(self, piece: Slice, rows: Tensor, point: Point) -> Tensor:
        """Some rows of a matrix that this process holds whole, at ``point``: [rows, width] in the weights' dtype."""
        width = piece.info.shape[-1]
        weights = piece.weights.view(-1, width)
        out = torch.empty(rows.numel(), width, dtype=weights.dtype, device=self.device)
        count = max(1, self._values.numel() // width)
        for begin in range(0, rows.numel(), count):
            some = rows[begin : begin + count]
            values = weights[some].to(torch.float32)
            active = self._directions.active(piece.info, values)
            for seed, coefficient in point.terms:
                direction = self._directions.rows(seed, some * width + piece.start, width, self.step_number())
                values.add_(direction if active is None else direction.mul_(active), alpha=coefficient)
            out[begin : begin + count] = values
        return out

    def _fill(self, out: Tensor, seed: int, start: int, active: Tensor | None, number: int | None = None) -> Tensor:
        """Write a direction into ``out``, that of step ``number`` or of the next one: 0 at weights that do not move."""
        self._directions.fill(out, seed, start, self.step_number() if number is None else number)
        return out if active is None else out.mul_(active)

    def _active(self, chunk: Chunk, weights: Sequence[Tensor] | None = None) -> Tensor | None:
        """Which weights of a chunk move, as in ``Directions``; by those of all slices, None for the working weights."""
        found: list[tuple[slice, Tensor]] = []
        for piece in chunk.pieces:
            own = self.slices[piece.slice]
            some = own.weights if weights is None else weights[piece.slice]
            part = self._directions.active(own.info, some[piece.begin : piece.end])
            if part is not None:
                found.append((piece.span, part))
        if not found or len(chunk.pieces) == 1:
            return found[0][1] if found else None
        active = torch.ones(chunk.numel, dtype=torch.float32, device=self.device)
        for span, part in found:
            active[span] = part
        return active

    @torch.no_grad()
    def apply(self, steps: Sequence[Step]) -> None:
        """Apply updates to the weights, in order; the same bits whether they come one by one or all at once.

        Step number 0 of a run that decays towards its start says what the start is: the weights as they are then.

        Raises:
            ValueError: If a later step needs the start, or moments, and they are not known.
        """
        anchored = [step for step in steps if step.decay_towards == "start"]
        if anchored and anchored[0].number == 0:
            self.start = self.save(self.start)
        elif anchored and self.start is None:
            raise ValueError(
                f"step {anchored[0].number} decays towards the weights that the run started from, which are not known "
                "here: begin with step 0, on the base weights"
            )
        if steps and (rule := steps[0].rule) is not None:
            self.moments = rule.begin(steps[0].number, [piece.weights for piece in self.slices], self.moments)
        steps = [step for step in steps if not step.changes_nothing]
        for chunk in self._chunks if steps else ():
            for step in steps:
                self._apply(step, chunk)

    def _apply(self, step: Step, chunk: Chunk) -> None:
        values, active = self._values[: chunk.numel], self._active(chunk)
        for piece in chunk.pieces:
            weights = self.slices[piece.slice].weights[piece.begin : piece.end]
            self.stores[piece.slice].read(weights, piece.begin, values[piece.span])
        moved = self._pull(step, chunk, values) if any(step.decays) else values
        total = moved if step.rule is None else torch.zeros_like(values)
        for seed, coefficients in step.terms:
            if not any(coefficients):
                continue
            direction = self._fill(self._direction[: chunk.numel], seed, chunk.start, active, step.number)
            for group, span in chunk.spans():
                if coefficients[group]:  # adding 0 * z would turn -0.0 into +0.0
                    total[span].add_(direction[span], alpha=coefficients[group])
        if step.rule is not None and self.moments is not None:
            for piece in chunk.pieces:
                state = self.moments[piece.slice][piece.begin : piece.end]
                step.rule.move(moved[piece.span], total[piece.span], state, step.rates[piece.group])
        if moved is not values:
            values.add_(moved)
        lanes = self._lanes[: chunk.numel]
        if self._rounds:
            fill_rounding_lanes(lanes, self.rounding, step.number, chunk.start)
        for piece in chunk.pieces:
            weights = self.slices[piece.slice].weights[piece.begin : piece.end]
            self.stores[piece.slice].write(weights, piece.begin, values[piece.span], lanes[piece.span])

    def _pull(self, step: Step, chunk: Chunk, values: Tensor) -> Tensor:
        """By how much decay moves ``values``; it is added to them together with the terms.

        By itself it is often less than half of a weight's last bit, and would be lost at every step.
        """
        moves = torch.empty_like(values)
        for piece in chunk.pieces:
            out, decay = moves[piece.span], step.decays[piece.group]
            if not decay:
                out.fill_(-0.0)  # adding that changes no number, adding 0.0 would change -0.0
            elif step.decay_towards == "zero":
                torch.mul(values[piece.span], -decay, out=out)
            else:
                assert self.start is not None
                start = self.start[piece.slice][piece.begin : piece.end]
                torch.sub(values[piece.span], start, out=out).mul_(-decay)
        return moves

    @property
    def _rounds(self) -> bool:
        return self.rounding != "master" and any(piece.parameter.dtype != torch.float32 for piece in self.slices)

    def fingerprint(self) -> int:
        """A 64-bit hash of the working weights, see ``fingerprints.py``; those of shards add up, modulo 2^64."""
        return fingerprint_of(
            (piece.info.name, Shard(piece.weights, piece.info.shape, piece.begin, False))  # pyright: ignore[reportCallIssue]
            for piece in self.slices
        )
