"""From an estimate and its evaluation to the figures that are logged and kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean

import torch
from torch import Tensor

from mezo_lightning.data.batch import Batch
from mezo_lightning.evaluators import Evaluation, Samples
from mezo_lightning.reporting.records import SampleRecord, StepRecord
from mezo_lightning.rewarding.log import Tally
from mezo_lightning.rewarding.masks import Masks
from mezo_lightning.steps import GradientEstimate


def step_record(
    estimate: GradientEstimate,
    step: int,
    learning_rates: list[float],
    seconds: float,
    update_rms: float | None = None,
    *,
    masks: Masks | None = None,
    tally: Tally | None = None,
) -> StepRecord:
    """What is kept of a step.

    Args:
        estimate: The estimate that was applied, with its evaluation.
        step: The number of the step, from 1.
        learning_rates: Of each parameter group, as the step used them.
        seconds: How long the step took.
        update_rms: How far the step moved a weight.
        masks: What was left out of each round.
        tally: What there is to say about asking rewards.
    """
    evaluation, tally = estimate.evaluation, tally or Tally()
    assert evaluation is not None
    identical = evaluation.identical_fraction(estimate.pairs)
    rounds = (*estimate.earlier, evaluation)
    valued = [one for one in rounds if one.compare is None]  # where samples are compared, points have no values
    return StepRecord(
        step=step,
        objective={point.label: mean for one in valued for point, mean in zip(one.points, one.means, strict=True)},
        projected_grads=list(estimate.projected_grads[:1] if estimate.weights else estimate.projected_grads),
        lr=learning_rates,
        valid_fraction=min(float(one.valid.double().mean()) for one in rounds),
        tie_fraction=evaluation.tie_fraction(estimate.pairs),
        identical_fraction=None if math.isnan(identical) else identical,
        probes_per_second=sum(len(one.points) for one in rounds) / seconds,
        skipped=estimate.skipped,
        metrics=_mean_metrics(rounds) | tally.statements(),
        calls=tally.calls(),
        update_rms=update_rms,
        masks=[[[row, component] for row, component in one] for one in masks or []],
    )


def flatten(record: StepRecord) -> dict[str, float]:
    """A record as one number per name, for loggers."""
    figures = {f"objective/{label}": value for label, value in record.objective.items()}
    several = len(record.projected_grads) > 1
    figures |= {f"projected_grad{f'/q{i}' if several else ''}": g for i, g in enumerate(record.projected_grads)}
    figures |= {f"lr{f'/group{i}' if len(record.lr) > 1 else ''}": lr for i, lr in enumerate(record.lr)}
    if record.update_rms is not None:
        figures["update_rms"] = record.update_rms
    figures |= record.metrics
    figures |= {f"rewards/calls/{name}": value for name, value in record.calls.items()}
    figures |= {"valid_fraction": record.valid_fraction, "tie_fraction": record.tie_fraction}
    if record.identical_fraction is not None:
        figures["identical_fraction"] = record.identical_fraction
    return {**figures, "probes_per_second": record.probes_per_second}


def sample_records(batch: Batch, samples: Samples, step: int) -> list[SampleRecord]:
    """The rows of a batch as a person reads them."""
    completions = samples.completions or ("",) * len(batch)
    metrics = {name: values.tolist() for name, values in samples.metrics.items()}
    figures = [{name: float(values[row]) for name, values in metrics.items()} for row in range(len(batch))]
    notes = [dict(note) for note in samples.notes or ({},) * len(batch)]
    targets = batch.targets or (None,) * len(batch)
    rows = zip(batch.index, batch.prompts, completions, figures, notes, targets, strict=True)
    return [SampleRecord(step, *row) for row in rows]


def means(batch: Batch, samples: Samples, tally: Tally) -> Iterator[tuple[str, Tensor | float, int]]:
    """The objective, each metric and what rewards said, as (name, mean, number of samples that it is over).

    Args:
        batch: The rows.
        samples: As they were measured; a figure that none of them has is left out.
        tally: What there is to say about asking rewards.
    """
    valid = samples.valid.any(-1)
    objective = samples.values.masked_fill(~samples.valid, 0.0).sum(-1).double()
    figures = {name: values[~values.isnan()].double() for name, values in samples.metrics.items()}
    for name, known in {"objective": objective[valid], **figures}.items():
        if known.numel():
            yield name, known.mean(), known.numel()
    for name, value in tally.statements().items():
        yield name, value, len(batch)


def _mean_metrics(rounds: Sequence[Evaluation]) -> dict[str, float]:
    """Means over all probes and the samples that have a value."""
    metrics, samples = {}, [part for one in rounds for part in one.samples]
    for name in samples[0].metrics:
        values: Tensor = torch.cat([part.metrics[name].double().cpu() for part in samples])
        known = values[~values.isnan()].tolist()
        if known:
            metrics[name] = fmean(known)
    return metrics
