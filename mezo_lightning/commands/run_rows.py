"""The rows behind a run's saved completions, read again from where the run had them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mezo_lightning.data import PromptDataModule
from mezo_lightning.data.batch import Batch
from mezo_lightning.reporting.records import SampleRecord

log = logging.getLogger(__name__)

CONFIG = "config.yaml"

Columns = Mapping[str, Mapping[int, Any]]
"""By column and row number, a value."""


def columns_of_samples(run: Path, samples: Sequence[SampleRecord], *, predicted: bool = False) -> Columns:
    """For each column of the data, its value in each row that was completed.

    Args:
        run: The run's folder.
        samples: What was completed.
        predicted: Whether by ``mezo predict``; else in a validation.

    Returns:
        By column and row number; no column where the data cannot be read any more.

    Raises:
        ValueError: If the data is not what the run had: there the prompts differ.
    """
    try:
        batch = _batch(run, predicted)
    except (OSError, ValueError, TypeError, KeyError) as error:
        log.warning("the columns of the data are not known, for they cannot be read again: %s", error)
        return {}
    places = {index: place for place, index in enumerate(batch.index)}
    for sample in samples:
        if sample.index not in places or batch.prompts[places[sample.index]] != sample.prompt:
            raise ValueError(
                f"{run / CONFIG} names data that is not what the run had: row {sample.index} has another prompt now. "
                "Bring back the data of the run to score its completions"
            )
    return {
        name: {sample.index: values[places[sample.index]] for sample in samples}
        for name, values in batch.columns.items()
    }


def _batch(run: Path, predicted: bool) -> Batch:
    """The rows of the split."""
    path = run / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    data = PromptDataModule(**{"seed": config["seed_everything"], **config["data"]})
    data.setup("predict" if predicted else "validate")
    return data.splits["validation" if not predicted else "predict" if "predict" in data.splits else "test"]
