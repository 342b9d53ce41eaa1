"""The LightningModule: MeZO steps under manual optimization, from any objective to any Hugging Face causal LM.

``training_step`` is the algorithm; everything it uses is a part with an interface of its own: an objective measures
samples, an evaluator gives the model the weights of each probe, an estimator makes an estimate of the values, a
transform acts on its scalars, and the optimizer applies and records it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from mezo_lightning.batch import Batch
from mezo_lightning.data import PromptDataModule
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import CentralDifference, Estimator
from mezo_lightning.evaluators import Copy, Evaluator, Samples
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.measurements import flatten, known_values, sample_records, step_record
from mezo_lightning.models import Pretrained
from mezo_lightning.objectives import BoundObjective, Objective
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.records import StepRecord
from mezo_lightning.refusals import check_trainer
from mezo_lightning.resuming import Lineage, check_new, check_resumed
from mezo_lightning.samplers import derive_seed
from mezo_lightning.schedules import build_optimizer, step_after_training_step, step_after_validation
from mezo_lightning.startup import check_every_kind_counts
from mezo_lightning.steps import GradientEstimate
from mezo_lightning.trajectory import Header, Trajectory
from mezo_lightning.transforms import Identity, Transform

if TYPE_CHECKING:
    from mezo_lightning.models import CausalLM

log = logging.getLogger(__name__)

EvaluatorName = Literal["auto", "leaf_scratch", "copy"]
_DIRECTIONS, _DECODING = 0, 1  # what a step's seeds are for
_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
_IN_PROGRESS_BAR = ("reward", "loss", "probes_per_second")
_SMALL_SHARE = 0.1  # of the weights: so few trainable ones may well be copied


class TooManySkippedStepsError(RuntimeError):
    """A run was stopped because step after step was skipped."""


class MeZOModule(pl.LightningModule):
    """Tunes a causal language model with forward passes only.

    Args:
        pretrained: The model to start from.
        objective: What to minimise: ``CrossEntropy``, or ``RewardObjective`` for any reward.
        estimator: How the gradient is estimated from values of the objective.
        transform: What happens to the projected gradients before the update, such as ``Clip``.
        optimizer: The update: ``MeZO`` with a learning rate, weight decay and a way of rounding.
        lr_scheduler: Any torch scheduler, stepped once a training step (ReduceLROnPlateau: once a validation).
        encoding: How text becomes token ids.
        evaluator: How the model gets the weights of each probe. ``leaf_scratch`` perturbs one leaf module at a time,
            in hardly more memory than a forward; ``copy`` keeps a copy of the trainable weights and suits any module.
            ``auto`` takes ``copy`` for generation and where few weights are trainable.
        micro_batch_size: Rows that go through the model at once; None for the whole batch. One direction is evaluated
            on all of them, so it changes memory and speed but not the step.
        min_valid_fraction: With fewer samples than this left after failed rewards, a step is skipped.
        max_skipped_steps: So many skipped steps in a row stop the run.
        startup_checks: Before the first step, call the reward once on a real batch, and make sure that every group of
            trainable parameters moves the model's output. Switch it off for rewards that cost money.
        num_samples: How many validation rows are shown in tables and in the report.
        seed: Decides all directions and all sampling noise.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        objective: Objective,
        estimator: Estimator = CentralDifference(),  # noqa: B008  (frozen)
        transform: Transform = Identity(),  # noqa: B008  (frozen)
        optimizer: Callable[[Iterable], Optimizer] = MeZO,
        lr_scheduler: LRSchedulerCallable | None = None,
        encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
        evaluator: EvaluatorName = "auto",
        micro_batch_size: int | None = None,
        min_valid_fraction: float = 0.5,
        max_skipped_steps: int = 10,
        startup_checks: bool = True,
        num_samples: int = 8,
        seed: int = 0,
    ):
        super().__init__()
        self.save_hyperparameters(logger=False)
        for name in ("optimizer", "lr_scheduler"):  # from Python they are functions, which have no place in a file
            if callable(self.hparams[name]):
                self.remove_ignored_hparams([name])
        if micro_batch_size is not None and micro_batch_size < 1:
            raise ValueError(f"micro_batch_size={micro_batch_size} must be at least 1, or null for the whole batch")
        if max_skipped_steps < 1:
            raise ValueError(f"max_skipped_steps={max_skipped_steps} must be at least 1")
        self.automatic_optimization = False
        self.pretrained = pretrained
        self.objective = objective
        self.estimator = estimator
        self.transform = transform
        self.encoding = encoding
        self.evaluator_name: EvaluatorName = evaluator
        self.micro_batch_size = micro_batch_size
        self.min_valid_fraction = min_valid_fraction
        self.max_skipped_steps = max_skipped_steps
        self.startup_checks = startup_checks
        self.num_samples = num_samples
        self.seed = seed
        self.model: nn.Module | None = None
        """The causal LM, once it is loaded; assign one (and ``tokenizer``) before the run to use your own."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.evaluator: Evaluator
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        trial = [("trial", nn.Parameter(torch.zeros(1)))]
        build_optimizer(optimizer, lr_scheduler, trial)  # finds mistakes before a model is loaded
        self._bound: BoundObjective
        self._skipped_steps = 0
        self._skipped_in_a_row = 0
        self._lineage = Lineage()

    # -- the algorithm -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One MeZO step: probe, estimate, update."""
        started = time.perf_counter()
        step = self.global_step
        decoding_seed = derive_seed(self.seed, step, _DECODING)
        evaluate = self.evaluator(lambda: self._measure(batch, decoding_seed))
        estimate = self.estimator.estimate(evaluate, seed=derive_seed(self.seed, step, _DIRECTIONS))
        estimate = self.transform(estimate)
        learning_rates = self._learning_rates()
        with uninterrupted():  # weights, Lightning's count of steps and the schedule change together
            self.optimizers().step(estimate=estimate)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            step_after_training_step(self.lr_schedulers())
        record = step_record(estimate, step + 1, learning_rates, time.perf_counter() - started)
        self._log_step(record, estimate, len(batch))
        return {"record": record}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Measure a batch at the weights as they are."""
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Measure a batch at the weights as they are."""
        return self._evaluation_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete or score a batch at the weights as they are: for each row its index, prompt, completion, metrics."""
        records = sample_records(batch, self._measure(batch, self.seed), self.global_step)
        return [dataclasses.asdict(record) for record in records]  # Lightning refuses frozen dataclasses here

    def _measure(self, batch: Batch, decoding_seed: int) -> Samples:
        with _fp32_by_default():
            parts = [self._bound.samples(part, seed=decoding_seed) for part in batch.split(self.micro_batch_size)]
        return Samples.concatenate(parts)

    def _evaluation_step(self, batch: Batch, stage: str) -> dict[str, Any]:
        samples = self._measure(batch, self.seed)  # the same noise at every validation
        for name, known in known_values(samples).items():  # means over all batches, weighted by the rows that count
            self.log(f"{stage}/{name}", known.mean(), batch_size=known.numel(), prog_bar=name == "reward")
        shown = [place for place, index in enumerate(batch.index) if index < self.num_samples]
        records = sample_records(batch, samples, self.global_step)
        return {"samples": [records[place] for place in shown]}

    # -- set-up --------------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """What the model is called in reports."""
        return self.pretrained.name

    def train(self, mode: bool = True) -> MeZOModule:
        """Stay in eval mode: dropout would be noise between the probes of a step."""
        del mode
        return super().train(False)

    def to(self, *args: Any, **kwargs: Any) -> MeZOModule:
        """Move to a device. `dtype=...` is ignored, for the model is loaded in its dtype already.

        Lightning's bf16-true and 16-true would cast buffers too, such as rotary frequencies, which transformers keeps
        in fp32: another model would be tuned than the one that is exported.
        """
        kwargs.pop("dtype", None)
        return super().to(*args, **kwargs) if args or kwargs else self

    def configure_callbacks(self) -> list[pl.Callback]:
        """Refuse what cannot work: this hook comes before Lightning's own checks and before any work."""
        check_trainer(self.trainer)
        return [_CloseTrajectory()]

    def configure_model(self) -> None:
        """Load the model in the trainer's precision, unless there is one, and bind the objective to it."""
        if self._trainer is not None:  # load_from_checkpoint calls this too, before the checkpoint has said its dtype
            self._load(_DTYPES[str(self.trainer.precision)])

    def _load(self, dtype: torch.dtype) -> None:
        if self.model is None:
            self.model = self.pretrained.load(dtype)
        for parameter in self.model.parameters():  # of a model that was assigned
            parameter.data = parameter.data.to(dtype)
        if self.tokenizer is None:
            self.tokenizer = self.pretrained.load_tokenizer()
        self._bound = self.objective.bind(cast("CausalLM", self.model), self.tokenizer, self.encoding)
        self.train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters, under their names in the Hugging Face model."""
        assert self.model is not None
        named = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        optimizer, scheduler = build_optimizer(self._make_optimizer, self._make_scheduler, named)
        if scheduler is None:
            return optimizer
        # The interval is for LearningRateMonitor, which would log once an epoch otherwise.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # pyright: ignore

    def on_fit_start(self) -> None:
        """Build the evaluator, and find whatever is wrong with rows, rewards and parameters before the first step."""
        # Eval mode is on purpose, and so are checkpoints of the weights after a step; Lightning warns of both.
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
        warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
        assert self.model is not None
        self._check_trajectory()
        self.evaluator = self._make_evaluator(self._mezo.space)
        splits = self.trainer.datamodule.splits if isinstance(self.trainer.datamodule, PromptDataModule) else {}  # pyright: ignore[reportAttributeAccessIssue]
        for batch in splits.values():
            self._bound.check(batch)
        if self.startup_checks and "train" in splits:
            batch = splits["train"].select(range(min(4, len(splits["train"]))))
            self._bound.startup(batch)
            check_every_kind_counts(self._mezo.space, self._make_evaluator, lambda: self._logits(batch))

    def _make_evaluator(self, space: ParameterSpace) -> Evaluator:
        assert self.model is not None
        if self._copies:
            return Copy(space, min_valid_fraction=self.min_valid_fraction)
        return LeafScratch(self.model, space, min_valid_fraction=self.min_valid_fraction)

    @property
    def _copies(self) -> bool:
        """Whether a copy of the trainable weights serves better than perturbing module by module."""
        if self.evaluator_name != "auto":
            return self.evaluator_name == "copy"
        total = sum(parameter.numel() for parameter in self.parameters())
        return self.objective.autoregressive or self._mezo.space.numel < _SMALL_SHARE * total

    def _logits(self, batch: Batch) -> Tensor:
        encoder = self.encoding.bind(cast("CausalLM", self.model), cast(PreTrainedTokenizerBase, self.tokenizer))
        inputs = encoder.pad([encoder.prompt(prompt, reserve=1) for prompt in batch.prompts[:2]], self.device)
        return cast(nn.Module, self.model)(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits

    @property
    def _mezo(self) -> MeZO:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, MeZO)
        return optimizer

    # -- the trajectory and checkpoints --------------------------------------------------------------------------------

    @property
    def _trajectory_path(self) -> Path:
        return Path(self.trainer.default_root_dir) / "trajectory.bin"

    def _check_trajectory(self) -> None:
        """Refuse a folder that is another run's, before anything is written to it."""
        if self.trainer.ckpt_path is None:
            check_new(self._trajectory_path)
        else:
            check_resumed(self._trajectory_path, str(self.trainer.ckpt_path), self._lineage)

    def on_train_start(self) -> None:
        """Start the trajectory, or take it up again at the checkpoint's step."""
        path = self._trajectory_path
        if self.trainer.ckpt_path is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            trajectory = Trajectory.create(path, Header.of(self._mezo.space, dataclasses.asdict(self.pretrained)))
        else:
            trajectory = Trajectory.open(path, append=True)
            trajectory.truncate(self.global_step)
        self._mezo.trajectory = trajectory

    def close_trajectory(self) -> None:
        """Close the file, all of which is on disk already; checkpoints may still be saved."""
        if self.trainer.optimizers and self._mezo.trajectory is not None:
            self._lineage = Lineage.of(self._mezo.trajectory, self.global_step)
            self._mezo.trajectory.close()
            self._mezo.trajectory = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        assert self.model is not None
        trajectory = self._mezo.trajectory if self.trainer.optimizers else None
        lineage = self._lineage if trajectory is None else Lineage.of(trajectory, self.global_step)
        checkpoint["mezo"] = {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "lineage": dataclasses.asdict(lineage),
            "skipped_steps": self._skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; outside of a trainer, load the model as well, in the checkpoint's dtype."""
        state = checkpoint["mezo"]
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and "optimizer_states" not in checkpoint:
            raise ValueError(
                f"ckpt_path={self.trainer.ckpt_path} holds weights only (save_weights_only: true), which is enough to "
                "validate, test, predict and export, but not to resume from"
            )
        self._lineage = Lineage(**state["lineage"])
        self._skipped_steps = state["skipped_steps"]
        self._skipped_in_a_row = state["skipped_in_a_row"]
        dtype = getattr(torch, state["dtype"])
        if self.model is None:
            self._load(dtype)
        found = next(self.model.parameters()).dtype  # pyright: ignore[reportOptionalMemberAccess]
        if found != dtype:
            raise ValueError(f"the checkpoint's weights are {dtype}, this model's are {found}; set trainer.precision")

    # -- what is logged ------------------------------------------------------------------------------------------------

    def _log_step(self, record: StepRecord, estimate: GradientEstimate, batch_size: int) -> None:
        if estimate.skipped is None:
            self._skipped_in_a_row = 0
        else:
            self._skipped_steps += 1
            self._skipped_in_a_row += 1
            log.warning("step %d was skipped: %s", record.step, estimate.skipped)
        figures = {**flatten(record), "skipped_steps": float(self._skipped_steps)}
        for name, value in figures.items():
            self.log(name, value, prog_bar=name in _IN_PROGRESS_BAR, batch_size=batch_size)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop after too many skipped steps in a row; here, the last of them is on record."""
        if self._skipped_in_a_row >= self.max_skipped_steps:
            raise TooManySkippedStepsError(
                f"{self._skipped_in_a_row} steps in a row were skipped, the last one because "
                f"{outputs['record'].skipped}; the run is stopped, for it would change nothing "
                "(model.max_skipped_steps sets how many are too many)"
            )

    def _learning_rates(self) -> list[float]:
        return [float(group["lr"]) for group in self._mezo.param_groups]

    def on_validation_end(self) -> None:
        """Step a scheduler that waits for a validation."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            step_after_validation(self.lr_schedulers(), self.trainer.callback_metrics)


class _CloseTrajectory(pl.Callback):
    """Ends a run's log, in good order or not: Lightning tears no module down after an exception."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, MeZOModule)
        pl_module.close_trajectory()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(pl_module, MeZOModule)
        pl_module.close_trajectory()


@contextmanager
def _fp32_by_default() -> Iterator[None]:
    """Undo Lightning's default dtype of bf16-true and 16-true, in which rewards would be computed otherwise."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
