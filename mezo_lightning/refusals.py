"""What Lightning offers and zeroth-order tuning cannot use: refused by name, with what to use instead.

Checked before Lightning's own checks, which speak of manual optimization, and before anything is loaded.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn

from mezo_lightning.estimators import Estimator
from mezo_lightning.strategies import ReplicatedStrategy, ZeRO3Strategy

_STRATEGIES = ("auto", "single_device", "replicated", "zero3_inference")
PRECISIONS = ("32-true", "bf16-true", "16-true")
_STRATEGY = (
    "trainer.strategy={} cannot be used: it is made for gradients, and there are none; use --trainer.strategy "
    "replicated (a copy of the model on each device), zero3_inference (the model cut up over all devices), or auto "
    "with --trainer.devices 1"
)


def check_strategy_name(name: str | Any) -> None:
    """Refuse the name of a strategy that cannot work, before Lightning builds it.

    Args:
        name: What ``trainer.strategy`` was set to; anything but a name is left to ``check_trainer``.
    """
    if isinstance(name, str) and name not in _STRATEGIES:
        raise ValueError(_STRATEGY.format(name))


def check_trainer(trainer: Trainer, estimator: Estimator) -> None:
    """Refuse a trainer that is set up for something that cannot work.

    Args:
        trainer: About to run.
        estimator: What a fit probes the model with.

    Raises:
        ValueError: With the setting, its value and what to use instead.
    """
    if trainer.precision not in PRECISIONS:
        raise ValueError(
            f"trainer.precision={trainer.precision!r} cannot be used: without a backward pass there is nothing for "
            "mixed precision to protect, and the weights themselves must have the dtype that is perturbed; use one of "
            f"{', '.join(PRECISIONS)}"
        )
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, ReplicatedStrategy)):
        raise ValueError(_STRATEGY.format(type(trainer.strategy).__name__))
    if trainer.state.fn == TrainerFn.FITTING:
        _check_fit(trainer)
        if estimator.by_row and isinstance(trainer.strategy, ZeRO3Strategy):
            raise ValueError(
                f"trainer.strategy=zero3_inference cannot be used with estimator={type(estimator).__name__}, which "
                "probes each row of a batch along a direction of its own: the weights would have to be whole; use "
                "--trainer.strategy replicated, or another estimator"
            )


def _check_fit(trainer: Trainer) -> None:
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches} cannot be used: there are no gradients "
            "to accumulate; set data.batch_size to the whole batch and model.micro_batch_size to what fits at once"
        )
    if trainer.gradient_clip_val is not None:
        raise ValueError(
            f"trainer.gradient_clip_val={trainer.gradient_clip_val} cannot be used: there is no gradient; limit the "
            "projected gradients with model.transform: {class_path: Clip, init_args: {limit: ...}}"
        )
    if isinstance(trainer.strategy, ZeRO3Strategy) and isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        raise ValueError(
            "the plugin AsyncCheckpointIO cannot be used with trainer.strategy=zero3_inference: a checkpoint of pieces "
            "counts once the last file of all processes is written; leave the plugin out"
        )
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]  (set by a connector)
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                "the callback StochasticWeightAveraging cannot be used: averaged weights are not the trajectory's; "
                "decay the learning rate instead, with model.lr_scheduler"
            )
        # Lightning 2.6 passes over it in silence where optimization is manual.
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise ValueError(
                "ModelCheckpoint's train_time_interval cannot be used: Lightning ignores it under manual optimization; "
                "set every_n_train_steps"
            )
        if isinstance(callback, GradientAccumulationScheduler) and callback.going_to_accumulate_grad_batches():
            raise ValueError(
                "the callback GradientAccumulationScheduler cannot be used: there are no gradients to accumulate; set "
                "data.batch_size to the whole batch and model.micro_batch_size to what fits at once"
            )
