"""The LightningModule: MeZO steps under manual optimization, from any objective to any Hugging Face causal LM.

``training_step`` is the algorithm; everything it uses is a part with an interface of its own: an objective measures
samples, an evaluator gives the model the weights of each probe, an estimator makes an estimate of the values, a
transform acts on its scalars, and the optimizer applies and records it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from transformers import PreTrainedTokenizerBase

from mezo_lightning.commands.predictions import PredictionCheck
from mezo_lightning.data import PromptDataModule
from mezo_lightning.data.batch import Batch
from mezo_lightning.encoding import Encoding
from mezo_lightning.estimators import CentralDifference, Estimator
from mezo_lightning.evaluators import Evaluator, Samples
from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.measurements import flatten, means, sample_records, step_record
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.objectives import BoundObjective, Objective
from mezo_lightning.objectives.preference import check_estimator, comparison
from mezo_lightning.optimizer import MeZO
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.probes import Probe
from mezo_lightning.processes.requeue import SignalsBetweenSteps
from mezo_lightning.refusals import check_trainer
from mezo_lightning.reporting.records import StepRecord
from mezo_lightning.resuming import AtTheEnd, Lineage, RunLog, check_dtype_of, check_whole
from mezo_lightning.rewarding.masks import Rounds
from mezo_lightning.samplers import derive_seed
from mezo_lightning.schedules import build_optimizer, step_after_training_step, step_after_validation
from mezo_lightning.sharding.checkpoints import loading, put_together
from mezo_lightning.sharding.placement import Placement, Whole
from mezo_lightning.skipping import SkipCounter
from mezo_lightning.startup import check_every_kind_counts, check_objective, fp32_by_default, logits, silence_lightning
from mezo_lightning.steps import GradientEstimate, Step
from mezo_lightning.strategies import ReplicatedStrategy
from mezo_lightning.transforms import Identity, Transform

if TYPE_CHECKING:
    from typing_extensions import Self

    from mezo_lightning.models.pretrained import CausalLM

log = logging.getLogger(__name__)

EvaluatorName = Literal["auto", "leaf_scratch", "copy"]
_DIRECTIONS, _DECODING, _SUBSPACES = 0, 1, 1 << 32  # what seeds are for; the last is where others have a step's number
_DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}
_IN_PROGRESS_BAR = ("reward", "loss", "probes_per_second")
_SMALL_SHARE = 0.1  # of the weights: so few trainable ones may well be copied


class MeZOModule(pl.LightningModule):
    """Tunes a causal language model with forward passes only.

    Args:
        pretrained: The model to start from.
        objective: ``CrossEntropy``, ``RewardObjective`` for any reward, or ``PreferenceObjective`` for comparisons.
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
        rewind: When a run is resumed, forget the steps that its log has after the checkpoint, and measure them anew;
            otherwise they are repeated from the log. With an update that remembers they always are measured anew.
        num_samples: How many validation rows are shown in tables and in the report.
        seed: Decides all directions and all sampling noise.
    """

    def __init__(
        self,
        pretrained: Pretrained,
        objective: Objective,
        estimator: Estimator = CentralDifference(),  # noqa: B008  (frozen)
        transform: Transform = Identity(),  # noqa: B008  (frozen)
        optimizer: Callable[[Iterable], MeZO] = MeZO,
        lr_scheduler: LRSchedulerCallable | None = None,
        encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
        evaluator: EvaluatorName = "auto",
        micro_batch_size: int | None = None,
        min_valid_fraction: float = 0.5,
        max_skipped_steps: int = 10,
        startup_checks: bool = True,
        rewind: bool = False,
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
        check_estimator(estimator, objective, pretrained)
        self.automatic_optimization = False
        self.pretrained = pretrained
        self.objective = objective
        self.estimator = estimator
        self.transform = transform
        self.encoding = encoding
        self.evaluator_name: EvaluatorName = evaluator
        self.micro_batch_size = micro_batch_size
        self.min_valid_fraction = min_valid_fraction
        self.startup_checks = startup_checks
        self.rewind = rewind
        self.num_samples = num_samples
        self.seed = seed
        self.model: nn.Module | None = None
        """The causal LM, once it is loaded; assign one (and ``tokenizer``) before the run to use your own."""
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.evaluator: Evaluator
        self._make_optimizer = optimizer
        self._make_scheduler = lr_scheduler
        trial = [("trial", nn.Parameter(torch.zeros(1)))]
        estimator.knowing(build_optimizer(optimizer, lr_scheduler, trial)[0])  # finds mistakes before a model is loaded
        self._bound: BoundObjective
        self._skips = SkipCounter(max_skipped_steps)
        self._rounds = Rounds()
        self._log: RunLog | None = None

    # -- the algorithm -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """One MeZO step: probe, estimate, update."""
        started = time.perf_counter()
        step = self.global_step
        if (recorded := self._run_log.recorded(step)) is not None:
            return self._repeat(recorded)
        decoding_seed = derive_seed(self.seed, step, _DECODING)
        now = (step, self.trainer.max_steps, Path(self.trainer.default_root_dir).name)
        compare = comparison(self._bound, batch, self.seed, Probe(*now, ranks=self._placement.ranks))
        measure = partial(self._measure, batch, self._bound.measure, decoding_seed, texts=compare is not None)
        evaluate = self._rounds.begin(self.evaluator(measure, compare), batch)
        estimator = self.estimator.knowing(self._mezo)
        estimate = self.transform(estimator.estimate(evaluate, seed=derive_seed(self.seed, step, _DIRECTIONS)))
        learning_rates = [float(group["lr"]) for group in self._mezo.param_groups]
        self._update(estimate=estimate)
        when = (step + 1, learning_rates, time.perf_counter() - started, self._mezo.update_rms)
        record = step_record(estimate, *when, masks=self._rounds.masks, tally=self._bound.take_tally())
        self._log_step(record, estimate, len(batch))
        return {"record": record}

    def _update(self, **update: Any) -> None:
        with uninterrupted():  # weights, Lightning's count of steps and the schedule change together
            self.optimizers().step(**update)  # pyright: ignore[reportAttributeAccessIssue]
            step_after_training_step(self.lr_schedulers())

    def _repeat(self, recorded: Step) -> dict[str, Any]:
        """Make a step that a resumed run made before."""
        self._skips.count(not recorded.terms)
        self._update(recorded=recorded)
        return {"record": None}

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Measure a batch at the weights as they are."""
        return self._evaluation_step(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Measure a batch at the weights as they are."""
        return self._evaluation_step(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete a batch, and measure it unless it lacks labels: each row's index, prompt, completion and metrics."""
        records = sample_records(batch, self._measure_as_is(batch, self._bound.predict), self.global_step)
        return [dataclasses.asdict(record) for record in records]  # Lightning refuses frozen dataclasses here

    def _measure(self, batch: Batch, ask: Callable[..., Samples], seed: int, *, texts: bool = False) -> Samples:
        """Measure a batch at the weights that the model has just now, by all ranks."""
        when = (self.global_step, self.trainer.max_steps, Path(self.trainer.default_root_dir).name, self._rounds.number)
        probe = Probe(*when, self._placement.ranks, self.micro_batch_size, texts, self.trainer.sanity_checking)
        with fp32_by_default():
            return ask(batch, seed=seed, probe=probe)

    def _measure_as_is(self, batch: Batch, ask: Callable[..., Samples]) -> Samples:
        assert self.model is not None
        with torch.inference_mode(), self._placement.present(self.model):
            return self._measure(batch, ask, self.seed, texts=True)  # the same noise at every validation

    def _evaluation_step(self, batch: Batch, stage: str) -> dict[str, Any]:
        samples = self._measure_as_is(batch, self._bound.measure)
        for name, mean, rows in means(batch, samples, self._bound.take_tally()):  # Lightning averages over all batches
            self.log(f"{stage}/{name}", mean, batch_size=rows, prog_bar=name in ("reward", "win_rate"))
        records = sample_records(batch, samples, self.global_step)
        return {"samples": [record for record in records if record.index < self.num_samples]}

    # -- set-up --------------------------------------------------------------------------------------------------------

    @property
    def model_name(self) -> str:
        """What the model is called in reports."""
        return self.pretrained.name

    @property
    def parameter_counts(self) -> tuple[int, int]:
        """How many weights the model has, and how many of them are trainable, wherever they are."""
        assert self.model is not None
        return self._placement.parameter_counts(self.model)

    @property
    def _placement(self) -> Placement:
        strategy = self.trainer.strategy if self._trainer is not None else None
        return strategy.placement if isinstance(strategy, ReplicatedStrategy) else Whole()

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
        check_trainer(self.trainer, self.estimator)
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._log = None  # an earlier run's
        signals = SignalsBetweenSteps(lambda: self._placement.ranks)
        return [AtTheEnd(self._close_log), PredictionCheck(lambda: self._bound), signals]

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Load a module with its model, see Lightning."""
        with loading(checkpoint_path):
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)

    def configure_model(self) -> None:
        """Load the model in the trainer's precision, unless there is one, and bind the objective to it."""
        if self._trainer is not None:  # load_from_checkpoint calls this too, before the checkpoint has said its dtype
            self._load(_DTYPES[str(self.trainer.precision)])

    def _load(self, dtype: torch.dtype) -> None:
        if self.model is None:
            self.objective.check_model(self.pretrained)
            self.model = self._placement.ranks.together(lambda: self._placement.load(self.pretrained, dtype))
        else:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(dtype)
            self._placement.adopt(cast("CausalLM", self.model))
        if self.tokenizer is None:
            self.tokenizer = self.pretrained.load_tokenizer()
        self._bound = self.objective.bind(cast("CausalLM", self.model), self.tokenizer, self.encoding)
        self._bound.check_ranks(self._placement.ranks)
        self.train()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the trainable parameters, under their names in the Hugging Face model."""
        assert self.model is not None
        named = [(name, p) for name, p in self._placement.named_parameters(self.model) if p.requires_grad]
        seed = derive_seed(self.seed, _SUBSPACES)
        optimizer, scheduler = build_optimizer(self._make_optimizer, self._make_scheduler, named, seed)
        if scheduler is None:
            return optimizer
        # The interval is for LearningRateMonitor, which would log once an epoch otherwise.
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}  # pyright: ignore

    def on_fit_start(self) -> None:
        """Build the evaluator, and find whatever is wrong with rows, rewards and parameters before the first step."""
        silence_lightning()
        self._run_log.check()
        model, base = cast(nn.Module, self.model), dataclasses.asdict(self.pretrained)
        self._header = self._placement.header(model, self._mezo.space, base)
        self._run_log.check_weights(self._header)
        self._placement.ranks.together(self._check)

    def _check(self) -> None:
        self.evaluator = self.make_evaluator(self._mezo.space)
        splits = self.trainer.datamodule.splits if isinstance(self.trainer.datamodule, PromptDataModule) else {}  # pyright: ignore[reportAttributeAccessIssue]
        for batch in splits.values():
            self._bound.check(batch)
        if self.startup_checks and "train" in splits:
            model = cast("CausalLM", self.model)
            encoder = self.encoding.bind(model, cast(PreTrainedTokenizerBase, self.tokenizer))
            batch = splits["train"].select(range(min(4, len(splits["train"]))))
            check_objective(self._bound, model, self._placement, batch)
            output = partial(logits, model, encoder, batch.prompts[:2])
            check_every_kind_counts(self._mezo.space, self.make_evaluator, output)

    def make_evaluator(self, space: ParameterSpace) -> Evaluator:
        """The evaluator that this run's settings ask for, over all or some of the model's parameters."""
        assert self.model is not None
        enough = self.min_valid_fraction
        return self._placement.evaluator(self.model, space, copies=self._copies, min_valid_fraction=enough)

    @property
    def _copies(self) -> bool:
        """Whether a copy of the trainable weights serves better than perturbing module by module."""
        if self.evaluator_name != "auto":
            return self.evaluator_name == "copy"
        total, trainable = self.parameter_counts
        return self.objective.autoregressive or trainable < _SMALL_SHARE * total

    @property
    def _mezo(self) -> MeZO:
        optimizer = self.trainer.optimizers[0]
        assert isinstance(optimizer, MeZO)
        return optimizer

    # -- the trajectory and checkpoints --------------------------------------------------------------------------------

    @property
    def _run_log(self) -> RunLog:
        if self._log is None:
            checkpoint = self.trainer.ckpt_path
            folder = Path(self.trainer.default_root_dir)
            self._log = RunLog(folder, self._placement.ranks, None if checkpoint is None else str(checkpoint))
        return self._log

    def on_train_start(self) -> None:
        """Start the trajectory, or take it up again at the checkpoint's step."""
        self._run_log.begin(self._mezo, self._header, self.global_step, self.rewind)

    def _close_log(self, finished: bool) -> None:
        if self.trainer.optimizers and self._log is not None:
            self._log.close(self._mezo, self.global_step, finished=finished)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what Lightning does not know of."""
        assert self.model is not None
        checkpoint["mezo"] = {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "lineage": dataclasses.asdict(self._run_log.lineage_of(self.global_step)),
            "fingerprint": self._placement.fingerprint(self._mezo.space) if self.trainer.optimizers else None,
            "objective": self._bound.state_dict(),
            "skipped_steps": self._skips.total,
            "skipped_in_a_row": self._skips.in_a_row,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back; outside of a trainer, load the model as well, in the checkpoint's dtype."""
        state = checkpoint["mezo"]
        path = str(self.trainer.ckpt_path) if self._trainer is not None else None
        if self._trainer is not None:
            if self.trainer.state.fn == TrainerFn.FITTING:
                check_whole(checkpoint, path)
            self._run_log.lineage = Lineage(**state["lineage"])
            self._run_log.fingerprint = state["fingerprint"]
        self._skips.total = state["skipped_steps"]
        self._skips.in_a_row = state["skipped_in_a_row"]
        dtype = getattr(torch, state["dtype"])
        if self.model is None:
            self._load(dtype)
        self._bound.load_state_dict(state.get("objective", {}))
        model = cast(nn.Module, self.model)
        check_dtype_of(model, dtype)
        if isinstance(self._placement, Whole):
            put_together(checkpoint, path, model)

    # -- what is logged ------------------------------------------------------------------------------------------------

    def _log_step(self, record: StepRecord, estimate: GradientEstimate, batch_size: int) -> None:
        self._skips.count(estimate.skipped is not None)
        if estimate.skipped is not None:
            log.warning("step %d was skipped: %s", record.step, estimate.skipped)
        for name, value in {**flatten(record), "skipped_steps": float(self._skips.total)}.items():
            self.log(name, value, prog_bar=name in _IN_PROGRESS_BAR, batch_size=batch_size)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        """Stop a run that goes nowhere, or whose ranks drift apart; here, its last step is on record."""
        if isinstance(self.trainer.strategy, ReplicatedStrategy):
            self.trainer.strategy.check_agreement(self.global_step, self._mezo)
        record: StepRecord | None = outputs["record"]
        self._skips.check(record.skipped if record is not None else None)

    def on_validation_end(self) -> None:
        """Step a scheduler that waits for a validation."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            step_after_validation(self.lr_schedulers(), self.trainer.callback_metrics)
