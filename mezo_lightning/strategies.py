"""Lightning strategies for several processes: ``replicated`` and ``zero3_inference``.

Both take Lightning's own way of starting processes: the Trainer's ``devices`` and ``num_nodes``, torchrun, or SLURM.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, Strategy, StrategyRegistry
from torch import Tensor, nn

from mezo_lightning.optimizer import MeZO
from mezo_lightning.processes.launching import Launcher
from mezo_lightning.processes.ranks import Group, RankError
from mezo_lightning.processes.watchdog import Watchdog
from mezo_lightning.sharding.checkpoints import load_small, optimizer_state, read_weights, save_sharded
from mezo_lightning.sharding.placement import Placement, Whole
from mezo_lightning.sharding.shard_files import remove
from mezo_lightning.sharding.zero3 import Gather, Sharded
from mezo_lightning.shards import Shard


class ReplicatedStrategy(DDPStrategy):
    """A copy of the model on each process; batches are split over them, and only seeds and scalars exchanged.

    Args:
        timeout: Seconds after which a job ends whose processes cannot reach one another.
        check_every_n_steps: How often the processes make sure that they hold the same weights.
    """

    def __init__(self, timeout: float = 600.0, check_every_n_steps: int = 100):
        if timeout <= 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds")
        if check_every_n_steps < 1:
            raise ValueError(f"check_every_n_steps={check_every_n_steps} must be at least 1")
        super().__init__(timeout=timedelta(seconds=timeout))
        self.timeout = timeout
        self.check_every_n_steps = check_every_n_steps
        self.placement: Placement
        self._watchdog: Watchdog | None = None

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes, self._report)

    def setup_distributed(self) -> None:
        """Join the other processes."""
        assert self.cluster_environment is not None
        assert isinstance(self._launcher, Launcher)
        with self._launcher.watching():
            super().setup_distributed()
            self.placement = self._make_placement()
            if self.world_size > 1:
                host = self.cluster_environment.main_address
                losses, farewell = self._launcher.losses, self._launcher.end_children
                self._watchdog = Watchdog(self.placement.ranks, host, self.timeout, losses, farewell)

    def _report(self, error: BaseException) -> str | None:
        return None if self._watchdog is None else self._watchdog.report(error)

    def teardown(self) -> None:
        """Leave the other processes, once they have come here too or something has failed."""
        super().teardown()
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _make_placement(self) -> Placement:
        return Whole(Group(self.global_rank, self.world_size))

    def check_agreement(self, step: int, optimizer: MeZO) -> None:
        """Make sure, every so many steps, that all ranks made the same steps and hold the same model.

        Args:
            step: How many steps were made.
            optimizer: On every rank.

        Raises:
            RankError: On all ranks, if they do not.
        """
        if step % self.check_every_n_steps:
            return
        fingerprint = self.placement.fingerprint(optimizer.space)
        states = self.placement.ranks.gather(lambda: (optimizer.digest, fingerprint))
        odd = [rank for rank, state in enumerate(states) if state != states[0]]
        if odd:
            what = "other steps" if any(states[rank][0] != states[0][0] for rank in odd) else "other weights"
            raise RankError(
                f"the processes have drifted apart: at step {step}, rank {', '.join(map(str, odd))} has {what} than "
                "rank 0; the run is stopped, for its weights are no longer those of its trajectory. Resume from the "
                "last checkpoint; where it happens again, suspect a machine, or a reward that changes global state"
            )

    def setup(self, trainer: Trainer) -> None:
        """Lightning's set-up without DistributedDataParallel, which averages gradients."""
        Strategy.setup(self, trainer)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # pyright: ignore[reportIncompatibleMethodOverride]
        return model

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the strategy known by its name."""
        strategy_registry.register("replicated", cls, description="MeZO with a copy of the model on each process")


class ZeRO3Strategy(ReplicatedStrategy):
    """The weights cut up over all processes, by DeepSpeed ZeRO-3 without an optimizer.

    Args:
        gather: How weights are put together to compute with: ``layer`` by layer, the ``whole`` model, or ``auto``, the
            latter where memory allows.
        timeout: Seconds after which a job ends whose processes cannot reach one another.
        check_every_n_steps: How often the processes make sure that they made the same steps.
    """

    def __init__(self, gather: Gather = "auto", timeout: float = 600.0, check_every_n_steps: int = 100):
        super().__init__(timeout, check_every_n_steps)
        if gather not in ("auto", "layer", "whole"):
            raise ValueError(f"gather={gather!r} must be 'auto', 'layer' or 'whole'")
        self.gather: Gather = gather

    def _make_placement(self) -> Placement:
        return Sharded(self.global_rank, self.world_size, self.root_device, self.gather)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Buffers: parameters are saved by themselves."""
        assert self.lightning_module is not None
        parameters = {name for name, _ in self.lightning_module.named_parameters(remove_duplicate=False)}
        state = self.lightning_module.state_dict()
        return {name: tensor for name, tensor in state.items() if name not in parameters}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save with all ranks, each its pieces."""
        pieces = cast(dict[str, Shard], self._pieces())
        save_sharded(checkpoint, filepath, self.placement.ranks, pieces, self.checkpoint_io.save_checkpoint)

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Remove a checkpoint, and its weights."""
        if self.is_global_zero:
            remove(filepath)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint without its weights."""
        self._checkpoint_path = str(checkpoint_path)
        return self.placement.ranks.together(lambda: load_small(self._checkpoint_path, weights_only))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Read this rank's pieces."""
        assert self.lightning_module is not None
        self.placement.ranks.together(lambda: read_weights(checkpoint, self._checkpoint_path, self._pieces()))
        parameters = {name for name, _ in self.lightning_module.named_parameters(remove_duplicate=False)}
        buffers = {name: tensor for name, tensor in checkpoint["state_dict"].items() if name not in parameters}
        self.lightning_module.load_state_dict(buffers, strict=False)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Read this rank's part of the optimizer's state."""
        [optimizer] = self.optimizers
        assert isinstance(optimizer, MeZO)
        state = self.placement.ranks.together(lambda: optimizer_state(checkpoint, self._checkpoint_path, optimizer))
        optimizer.load_state_dict(state)

    def _pieces(self) -> dict[str, Tensor]:
        model = getattr(self.lightning_module, "model")  # noqa: B009  (of MeZOModule, which imports this file)
        return dict(self.placement.named_parameters(model))

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Make the strategy known by its name."""
        strategy_registry.register("zero3_inference", cls, description="MeZO with weights sharded by DeepSpeed ZeRO-3")


for _strategy in (ReplicatedStrategy, ZeRO3Strategy):
    _strategy.register_strategies(StrategyRegistry)
