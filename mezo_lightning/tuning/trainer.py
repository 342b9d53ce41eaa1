"""``mezo tune``: measure, on a run's own model and batches, what its epsilon, learning rate and batch size should be.

The command takes the configuration of ``mezo fit`` and writes ``tuning.json`` and ``tuning.png`` into the run folder.
Nothing is tuned; the weights are those of the base model. Everything is measured along directions with independent
coordinates, whatever the run's sampler is: see ``units.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from rich.console import Group
from rich.text import Text

from mezo_lightning.data import PromptDataModule
from mezo_lightning.data.batch import Batch
from mezo_lightning.evaluators import Evaluate, Samples
from mezo_lightning.module import MeZOModule
from mezo_lightning.optimizer import MeZO
from mezo_lightning.probes import Probe
from mezo_lightning.reporting.terminal import write
from mezo_lightning.sharding.streaming import progress_bar
from mezo_lightning.startup import fp32_by_default
from mezo_lightning.tuning.measuring import FEWEST_DIRECTIONS, Tuning, count_probes, measure
from mezo_lightning.tuning.report import advise, options, picture, table
from mezo_lightning.tuning.units import Units, independent, units_of


class TuningTrainer(Trainer):
    """Lightning's trainer, which can also measure what a run needs to know before it starts."""

    def tune(
        self, model: MeZOModule, datamodule: PromptDataModule, num_batches: int = 4, num_directions: int = 64
    ) -> Tuning:
        """Measure by forward passes alone which epsilon, learning rate and batch size suit a run.

        Args:
            model: The run's module.
            datamodule: The run's data.
            num_batches: How many training batches are compared with one another.
            num_directions: Random directions for the curvature, at least 8; each costs six forward passes over a batch.

        Raises:
            ValueError: If there are too few rows or several processes, or the objective has no values.
        """
        if self.world_size > 1:
            raise ValueError(f"tune measures on one process, not on {self.world_size}: set trainer.devices to 1")
        if num_directions < FEWEST_DIRECTIONS:
            raise ValueError(f"num_directions={num_directions} must be at least {FEWEST_DIRECTIONS}")
        datamodule.setup("fit")
        batches = _first_batches(datamodule, num_batches)
        total = count_probes(num_batches, num_directions)
        with progress_bar(f"{total} passes over {len(batches[0])} rows", total) as advance:
            evaluates, units = _evaluates(self, model, batches, partial(advance, 1))
            tuning = measure(evaluates, seed=model.seed, num_directions=num_directions)
        folder = Path(self.default_root_dir)
        _save(tuning, units, folder)
        write(table(tuning, units))
        closing = f"options: {options(tuning, units)}", f"picture: {folder / 'tuning.png'}"
        write(Group(*(Text(line, no_wrap=True, overflow="ignore") for line in closing)))
        return tuning


def _first_batches(data: PromptDataModule, number: int) -> list[Batch]:
    rows = len(data.splits["train"])
    if number < 2:
        raise ValueError(f"num_batches={number} must be at least 2, to tell what batches share from what they do not")
    if rows < number * data.batch_size:
        raise ValueError(
            f"num_batches={number} of batch_size={data.batch_size} need {number * data.batch_size} rows, and there are "
            f"{rows} to train on; measure fewer or smaller batches"
        )
    return list(itertools.islice(data.train_dataloader(), number))


def _evaluates(
    trainer: Trainer, module: MeZOModule, batches: list[Batch], advance: Callable[[], object]
) -> tuple[list[Evaluate], Units]:
    """The run's objective on each batch, at points around the weights of the base model; and what they are in."""
    module.trainer = trainer
    module.configure_model()
    module.to(trainer.strategy.root_device)
    assert module.model is not None
    assert module.tokenizer is not None
    bound = module.objective.bind(module.model, module.tokenizer, module.encoding)  # pyright: ignore[reportArgumentType]
    made = module.configure_optimizers()
    optimizer = made["optimizer"] if isinstance(made, dict) else made  # pyright: ignore[reportGeneralTypeIssues]
    assert isinstance(optimizer, MeZO)
    units = units_of(optimizer, module.estimator, module.transform)
    optimizer.space.sampler = independent(optimizer.space.sampler)  # it makes no step: nothing else sees this
    evaluator = module.make_evaluator(optimizer.space)

    def samples(batch: Batch) -> Samples:
        advance()
        with fp32_by_default():
            return bound.measure(batch, seed=module.seed, probe=Probe(micro_batch_size=module.micro_batch_size))

    for batch in batches:
        bound.check(batch)
    return [evaluator(partial(samples, batch)) for batch in batches], units


def _save(tuning: Tuning, units: Units, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    advice = [dataclasses.asdict(one) for one in advise(tuning, units)]
    kept = {"advice": advice, "units": dataclasses.asdict(units), **dataclasses.asdict(tuning)}
    text = json.dumps(_finite(kept), indent=1, allow_nan=False)
    (folder / "tuning.json").write_text(text + "\n", encoding="utf-8")
    picture(tuning).savefig(folder / "tuning.png", dpi=120)


def _finite(value: Any) -> Any:
    """The value with None where JSON has no word for a number."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value
