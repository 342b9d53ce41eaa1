"""The update as an ordinary ``torch.optim.Optimizer``: it works in any PyTorch loop, with any LR scheduler.

optimizer = MeZO(model.named_parameters(), lr=1e-6)
evaluator = LeafScratch(model, optimizer.space)
for step, batch in enumerate(batches):
    estimate = CentralDifference(epsilon=1e-3).estimate(evaluator(lambda: loss(model, batch)), seed=step)
    optimizer.step(estimate=estimate)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mezo_lightning.dense import Dense
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.rounding import RoundingName
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Gaussian, Sampler
from mezo_lightning.shards import whole_shape
from mezo_lightning.steps import DecayTowards, GradientEstimate, Step, round_coefficient, round_fp32
from mezo_lightning.trajectory import MOST_TERMS, Trajectory
from mezo_lightning.updates import Memory, Trail, Update

Parameters = Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]]


class MeZO(torch.optim.Optimizer):
    """Gradient descent along seeded directions (MeZO, Malladi et al., 2023, arXiv 2305.17333, algorithm 1).

    ``theta <- theta - lr * weight_decay * theta - lr * scale * sum_i projected_grads[i] * z(seeds[i])``

    Nothing is stored per weight, except what ``rounding``, ``update`` and ``decay_towards`` may need. The coefficients
    are rounded to 12 significant bits; see ``steps.py`` for what that buys. Deviations from the published code: weight
    decay is decoupled and by the kind of parameter, not by its name, and the learning rate may be scheduled.

    Args:
        params: Parameters, preferably ``model.named_parameters()``, or parameter groups of them. Frozen ones are left
            out. Their order fixes the positions of the directions.
        lr: Learning rate; a group may have its own.
        weight_decay: Decoupled weight decay of matrices and embeddings; parameters with fewer than two dimensions
            (biases, norms) are not decayed, unless they are in a group with a ``weight_decay`` of its own. It is added
            up with the step along directions before that is rounded, so that it arrives on average, however small.
        sampler: The distribution of directions; None for ``Gaussian()``.
        rounding: How updates get into 16-bit weights: ``stochastic``, ``compensated`` or ``master``; fp32 weights need
            none of them.
        update: What is applied in the place of an estimate, such as ``Momentum`` or ``ScalarAdam``; None for the
            estimate itself. ``DenseMomentum`` and ``DenseAdam`` keep 4 and 8 bytes beside every weight.
        decay_towards: What weight decay is towards: ``zero``, or the ``start``, the weights before the first step
            (anchored decay, 2026, arXiv 2605.30148): ``theta <- theta - lr * weight_decay * (theta - start)``. The
            start is one more copy of the trainable weights that this process holds, in memory and in checkpoints.

    Raises:
        ValueError: If a number is out of range, no parameter is trainable, or two settings do not go together.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-6,
        *,
        weight_decay: float = 0.0,
        sampler: Sampler | None = None,
        rounding: RoundingName = "stochastic",
        update: Update | None = None,
        decay_towards: DecayTowards = "zero",
    ):
        self._has_all_groups = False
        groups = _split_by_kind(_as_groups(params), weight_decay)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for key in ("lr", "weight_decay"):
                if not float(group[key]) >= 0:
                    raise ValueError(f"{key}={group[key]} must not be negative")
        placed = sorted(
            (position, name, parameter, number)
            for number, group in enumerate(self.param_groups)
            for position, name, parameter in zip(
                group.pop("positions"), group["param_names"], group["params"], strict=True
            )
        )
        self._has_all_groups = True
        self.space = ParameterSpace.of(
            [(name, parameter) for _, name, parameter, _ in placed],
            [number for *_, number in placed],
            sampler or Gaussian(),
            rounding,
        )
        self.update = update
        self._memory = Memory()
        self.decay_towards: DecayTowards = decay_towards
        self.space.decay_towards = decay_towards
        self.space.rule = update if isinstance(update, Dense) else None
        self._check_update()
        self._check_decay(weight_decay)
        self._check_beside()
        self.trajectory: Trajectory | None = None
        """Where every step is recorded, if anywhere."""
        self.last_step = Step()
        """What changed the weights last; before the first step, nothing."""
        self._steps = 0
        self.space.step_number = self._number
        self._digest = hashlib.blake2b(digest_size=16)

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        estimate: GradientEstimate | None = None,
        recorded: Step | None = None,
    ) -> Any:
        """Apply an estimate to the weights, as one undivided change, and record it.

        Args:
            closure: Called once beforehand and its value returned; Lightning's hooks ride on it. It is not for the
                objective, which belongs to an evaluator.
            estimate: What to apply; an empty one counts as a step and changes nothing.
            recorded: In its place, a step that the trajectory has already: it is made again.

        Raises:
            ValueError: If there is neither, or a recorded step with an ``update``, which has to see estimates; or if a
                trajectory begins in the middle of a run that keeps something beside the weights.
        """
        result = closure() if closure is not None else None
        self._check_beginning()
        if recorded is None:
            if estimate is None:
                raise ValueError("MeZO.step needs estimate=..., made by an estimator; there are no gradients to read")
            memory, estimate = self._advance(estimate)
            step = self._make_step(memory, estimate)
        elif self.update is not None:
            raise ValueError(
                f"the trajectory has steps that the checkpoint lacks, and update={self.update} cannot repeat them, for "
                "it has to see the estimates that they were made from: resume with model.rewind=true"
            )
        else:
            memory, step = self._memory, recorded
        with uninterrupted():
            self.space.apply([step])
            self._memory = memory
            self.last_step = step
            self._steps = step.number + 1
            self._digest.update(repr((step.number, step.terms, step.decays, *step.rates)).encode())
            if self.trajectory is not None and recorded is None:
                self.trajectory.append(step)
        return result

    @property
    def digest(self) -> str:
        """A hash of all steps that this object made: that of another rank, if both made the same."""
        return self._digest.hexdigest()

    @property
    def update_rms(self) -> float | None:
        """The root mean square change of a weight in the last step, weight decay left out: see ``Step.rms``.

        None where it does not follow from coefficients: with dense moments, and where directions leave out weights or
        have scales.
        """
        if not self.space.sampler.unit_variance:
            return None
        numels = [
            sum(info.numel for info in self.space.table if info.group == k) for k in range(len(self.param_groups))
        ]
        return self.last_step.rms(numels)

    @property
    def memory(self) -> Memory:
        """What ``update`` remembers of the steps so far."""
        return self._memory

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Part of torch's own construction; later on the positions of the directions are fixed.

        Raises:
            ValueError: After construction.
        """
        if self._has_all_groups:
            raise ValueError("MeZO cannot take another parameter group: give it all of them when it is made")
        super().add_param_group(param_group)

    def _advance(self, estimate: GradientEstimate) -> tuple[Memory, GradientEstimate]:
        """What is remembered from now on, and what to apply; nothing changes yet."""
        if self.update is None or not estimate.seeds:
            return self._memory, estimate
        return self.update.advance(self._memory, estimate)

    def _make_step(self, memory: Memory, estimate: GradientEstimate) -> Step:
        number, rule = self._number(), self.space.rule
        if not estimate.seeds:
            return Step(number=number, decay_towards=self.decay_towards, rule=rule)
        if len(estimate.seeds) > MOST_TERMS:
            raise ValueError(
                f"a step of {len(estimate.seeds)} directions does not fit into a trajectory, which has room for "
                f"{MOST_TERMS}: use fewer queries or rows, or an update with a smaller window"
            )
        rates = [float(group["lr"]) for group in self.param_groups]
        decays = [float(group["weight_decay"]) for group in self.param_groups]
        factors = [-lr for lr in rates] if rule is None else [1.0] * len(rates)
        return Step(
            tuple(
                (seed, tuple(round_coefficient(factor * estimate.scale * g) for factor in factors))
                for seed, g in estimate.terms
            ),
            tuple(round_fp32(lr * decay) for lr, decay in zip(rates, decays, strict=True)),
            number,
            self.decay_towards,
            rule,
            () if rule is None else tuple(round_fp32(lr * rule.rate(memory)) for lr in rates),
        )

    def _check_update(self) -> None:
        sampler = self.space.sampler
        if self.update is not None and self.update.reach > 1 and not sampler.same_at_every_step:
            applies = "is for the estimator Cone, which applies" if isinstance(self.update, Trail) else "applies"
            raise ValueError(
                f"update={self.update} {applies} the directions of earlier steps again, but with sampler={sampler} a "
                "seed gives other ones by then: use Gaussian, Rademacher or a LowRank with refresh_left and "
                "refresh_right 0 or null, or an update without momentum"
            )

    def _check_decay(self, weight_decay: float) -> None:
        if self.decay_towards not in ("zero", "start"):
            raise ValueError(f"decay_towards={self.decay_towards!r} is unknown; choose 'zero' or 'start'")
        if self.decay_towards == "zero":
            return
        if not weight_decay and not any(group["weight_decay"] for group in self.param_groups):
            raise ValueError("decay_towards='start' does nothing without weight_decay: set that as well")

    def _check_beside(self) -> None:
        """Refuse two settings that keep something beside the weights: there is one place for it in checkpoints."""
        keeping = self._keeping()
        if len(keeping) > 1:
            raise ValueError(
                f"{' and '.join(keeping)} both keep something beside the weights, and only one may: use "
                f"{', or '.join(reversed(keeping.values()))}"
            )

    def _check_beginning(self) -> None:
        if self._steps and self.trajectory is not None and not len(self.trajectory) and (keeping := self._keeping()):
            raise ValueError(
                f"the trajectory would begin after {self._steps} steps, and could not be replayed without what "
                f"{', '.join(keeping)} keeps beside the weights: have it before the first step"
            )

    def _keeping(self) -> dict[str, str]:
        """The settings that keep something beside the weights, and what to use in their place."""
        keeping = {"decay_towards='start'": "decay_towards='zero'"} if self.decay_towards == "start" else {}
        if self.space.rule is not None:
            keeping[f"update={self.update}"] = "an update without dense moments (Momentum, ScalarAdam)"
        if any(store.state is not None for store in self.space.stores):
            keeping[f"rounding={self.space.rounding!r}"] = "rounding='stochastic'"
        return keeping

    def _number(self) -> int:
        # A trajectory counts by itself: it may have been begun in the middle of a run.
        return self._steps if self.trajectory is None else len(self.trajectory)

    def state_dict(self) -> dict[str, Any]:
        """Torch's state, the count of steps, what updates remember, and what is kept beside weights, by their name."""
        names = [piece.info.name for piece in self.space.slices]
        kept = self.space.moments or self.space.start or [store.state for store in self.space.stores]
        return {
            **super().state_dict(),
            "steps": self._steps,
            "rounding": self.space.rounding,
            "update": {"rule": _name_of(self.update), "memory": self._memory.state_dict()},
            "sampler": sampler_as_dict(self.space.sampler),
            "decay_towards": self.decay_towards,
            "beside": {name: tensor for name, tensor in zip(names, kept, strict=True) if tensor is not None},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore ``state_dict()``.

        Raises:
            ValueError: If it was saved with another way of rounding, another update, decay towards something else, or
                directions of another sampler, which the header of the log does not have.
        """
        update = state_dict.get("update", {"rule": _name_of(None), "memory": Memory().state_dict()})
        sampler = sampler_from_dict(state_dict["sampler"]) if "sampler" in state_dict else self.space.sampler
        for option, saved, own in (
            ("update", update["rule"], _name_of(self.update)),
            ("decay_towards", state_dict.get("decay_towards", "zero"), self.decay_towards),
            ("sampler", repr(sampler), repr(self.space.sampler)),
        ):
            if saved != own:
                raise ValueError(
                    f"the state was saved with {option}={saved}, this optimizer has {option}={own}: go on with the same"
                )
        if state_dict["rounding"] != self.space.rounding:
            raise ValueError(
                f"the state was saved with rounding={state_dict['rounding']!r}, this optimizer has "
                f"rounding={self.space.rounding!r}; they keep different things beside the weights"
            )
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._steps = state_dict["steps"]
        self._memory = Memory.from_state_dict(update["memory"])
        self.space.sampler = sampler
        beside, slices = state_dict["beside"], self.space.slices
        if self.decay_towards == "start" and self._steps:
            self.space.start = [beside[piece.info.name].to(piece.weights, copy=True) for piece in slices]
        if self.space.rule is not None and self._steps:
            self.space.moments = [beside[piece.info.name].to(self.space.device, copy=True) for piece in slices]
        # Torch casts tensors in `state` to the weights' dtype, which would destroy these.
        for piece, store in zip(slices, self.space.stores, strict=True):
            if store.state is not None:
                store.state.copy_(beside[piece.info.name])


def _name_of(update: Update | None) -> str:
    """What must stay the same over a resume: of a rule with dense moments, whose settings are on record, all of it."""
    if isinstance(update, Dense):
        return repr(update)
    return "none" if update is None else type(update).__name__


def _as_groups(params: Parameters) -> list[dict[str, Any]]:
    """Parameter groups with names and positions, without the frozen parameters."""
    items = list(params)
    if items and not isinstance(items[0], dict):
        items = [{"params": items}]
    groups, position = [], 0
    for group in items:
        assert isinstance(group, dict), group
        members: Any = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        named: list[tuple[str | None, Tensor]] = [m if isinstance(m, tuple) else (None, m) for m in members]
        kept = []
        for name, parameter in named:
            if parameter.requires_grad:
                kept.append((name or str(position), parameter, position))
            position += 1
        if kept:
            positions = [at for *_, at in kept]
            groups.append({**group, "params": [(name, p) for name, p, _ in kept], "positions": positions})
    if not groups:
        raise ValueError("there is no trainable parameter: requires_grad is False for all of them")
    return groups


def _split_by_kind(groups: list[dict[str, Any]], weight_decay: float) -> list[dict[str, Any]]:
    """Move vectors and scalars to groups without weight decay, where a group has none of its own."""
    result = []
    for group in groups:
        if "weight_decay" in group or not weight_decay:
            result.append(group)
            continue
        for decayed in (True, False):
            chosen = [i for i, (_, p) in enumerate(group["params"]) if (len(whole_shape(p)) >= 2) == decayed]
            if chosen:
                part = {key: [group[key][i] for i in chosen] for key in ("params", "positions")}
                result.append({**group, **part, "weight_decay": weight_decay if decayed else 0.0})
    return result
