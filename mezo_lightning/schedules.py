"""From what the configuration says to an optimizer and a learning-rate schedule that fit one another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, ReduceLROnPlateau
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.samplers import Sampler


def build_optimizer(
    make_optimizer: Callable[[Iterable], Optimizer],
    make_scheduler: LRSchedulerCallable | None,
    named: Sequence[tuple[str, Tensor]],
    seed: int | None = None,
) -> tuple[MeZO, Any]:
    """The optimizer over some named parameters, and its scheduler or None.

    Args:
        make_optimizer: Makes it.
        make_scheduler: Makes its scheduler; None for none.
        named: The parameters.
        seed: For what its sampler draws beside directions, if that has no seed of its own; None for a trial, whose
            parameters are not those of the model.

    Raises:
        ValueError: If the optimizer needs gradients, its sampler names parameters that are not there, or the scheduler
            waits for a figure without saying which.
    """
    optimizer = make_optimizer(named)
    if not isinstance(optimizer, MeZO):
        raise ValueError(f"model.optimizer={type(optimizer).__name__} needs gradients, and there are none; use MeZO")
    if seed is not None:
        optimizer.space.sampler = optimizer.space.sampler.seeded(seed)
        _check_names(optimizer.space)
    scheduler = None if make_scheduler is None else make_scheduler(optimizer)
    if isinstance(scheduler, torch_schedulers.ReduceLROnPlateau) and not isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError(
            "model.lr_scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau does not say what to watch; use "
            "lightning.pytorch.cli.ReduceLROnPlateau, with init_args: {monitor: val/reward, mode: max}"
        )
    return optimizer, scheduler


def _check_names(space: ParameterSpace) -> None:
    """Draw one element of each sampler that another one is made of: they look for names when they first draw."""
    sampler: Sampler | None = space.sampler
    while sampler is not None:
        sampler.bind(space.table).fill(torch.empty(1), seed=0, start=0)
        sampler = sampler.inner


def step_after_training_step(scheduler: Any) -> None:
    """Step a scheduler, unless there is none or it waits for a validation."""
    if scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step()


def step_after_validation(scheduler: Any, metrics: Mapping[str, Tensor]) -> None:
    """Step ReduceLROnPlateau, the one scheduler that waits for a validation.

    Raises:
        ValueError: If what it watches is not among the metrics.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        if scheduler.monitor not in metrics:
            raise ValueError(
                f"model.lr_scheduler watches monitor={scheduler.monitor!r}, which is not logged; there are "
                f"{', '.join(sorted(metrics))}"
            )
        scheduler.step(metrics[scheduler.monitor])
