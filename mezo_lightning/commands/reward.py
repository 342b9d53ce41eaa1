"""``mezo reward check`` and ``mezo reward rescore``: rewards tried on completions, without tuning anything.

``check`` shows how a reward would be called and what it says of some completions, from a file or of a model's own;
``rescore`` asks another reward about the completions that a run has saved.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mezo_lightning.commands.checking import Checked, ask, described_reward, described_values, summary
from mezo_lightning.commands.run_rows import Columns, columns_of_samples
from mezo_lightning.completers import Completer
from mezo_lightning.data.batch import Batch
from mezo_lightning.data.rendering import Template
from mezo_lightning.data.rows import Row, read_rows
from mezo_lightning.encoding import Encoding
from mezo_lightning.generation import Generate
from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.reporting.outcome import number
from mezo_lightning.reporting.records import RunRecords, SampleRecord
from mezo_lightning.rewarding.arguments import Rows
from mezo_lightning.rewarding.functions import NamedReward, named_rewards
from mezo_lightning.rewarding.settings import ConventionName, Reward

_PROMPT, _COMPLETION = "prompt", "completion"


def check_reward(
    reward: str | Reward | Callable[..., Any],
    data: str | None = None,
    prompt: str | None = None,
    completion: str = _COMPLETION,
    model: str | None = None,
    completer: Completer = Generate(),  # noqa: B008  (frozen)
    encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
    num_rows: int = 8,
    reward_kwargs: dict[str, Any] | None = None,
    convention: ConventionName | None = None,
    columns: dict[str, str] | None = None,
    conversational: bool = False,
    timeout: float | None = None,
) -> Checked | None:
    """Show how a reward is called, what it says of some completions, and what a run would make of that.

    Args:
        reward: An import path (rewards.squad.f1), folder/file.py:function, a class_path with init_args, or a Reward.
        data: Where the rows come from, as in a run: a JSON, JSONL, CSV, TSV or Parquet file, embedded/... or hub:...;
            without it the reward is only looked at.
        prompt: Template of the prompt, "Question: {question}"; by default the column `prompt`, where there is one.
        completion: The column that holds the completions to score; the right answers are worth a try, too.
        model: Score what this model writes instead: a folder, an id on the Hub, or embedded/opt-stories.
        completer: How the model answers.
        encoding: How text becomes tokens for it.
        num_rows: How many rows to score, from the first on.
        reward_kwargs: Arguments that are the same in every call; for a class, its arguments.
        convention: How the function is called, where its parameters do not tell.
        columns: Which column (or prompt, completion) an argument gets, where the names differ.
        conversational: Show prompts and completions as lists of one message, {role, content}.
        timeout: Seconds that a call may take.

    Returns:
        What the reward said; None without data.

    Raises:
        ValueError: If the reward cannot be called, returns no values, or fails for all rows.
    """
    given = (reward_kwargs or {}, convention, columns or {}, None, timeout, None, None, None, conversational)
    if isinstance(reward, Reward) and given != ({}, None, {}, None, None, None, None, None, False):
        raise ValueError("a Reward has its own settings: give reward_kwargs, convention and the like inside of it")
    [named] = named_rewards([reward if isinstance(reward, Reward) else Reward(reward, *given)])
    console = Console()
    if data is None:
        if model is not None:
            raise ValueError(f"model={model!r} needs prompts: give the rows with --data and a template with --prompt")
        console.print(described_reward(named))
        return None
    if num_rows < 1:
        raise ValueError(f"num_rows={num_rows} must be at least 1")
    rows = _rows(read_rows(data)[:num_rows], prompt, None if model is not None else completion)
    if model is not None:
        rows = _completed(rows, model, completer, encoding)
    _refuse_tokens_without_any(named, rows)
    try:
        named.check(rows.batch.columns)
    except ValueError:
        console.print(described_reward(named))
        raise
    console.print(described_reward(named, rows.batch.columns))
    checked = ask(named, rows)
    console.print(described_values(checked))
    _refuse_if_all_failed(checked)
    return checked


def rescore(
    run: str,
    reward: str | Reward | Callable[..., Any],
    file: str | None = None,
    output: str | None = None,
    reward_kwargs: dict[str, Any] | None = None,
) -> list[Checked]:
    """Ask a reward about the completions that a run has saved: validation rows at each validation, or predictions.

    Columns of the data are read again from where the run's config.yaml says.

    Args:
        run: The run's folder.
        reward: An import path (rewards.squad.f1), folder/file.py:function, a class_path with init_args, or a Reward.
        file: The predictions to score, predictions.jsonl; by default the samples of the run's validations (their number
            is the run's setting num_samples).
        output: A file to write, one JSON line for each completion.
        reward_kwargs: Arguments that are the same in every call; for a class, its arguments.

    Returns:
        What the reward said, in the order of the steps.

    Raises:
        ValueError: If there are no completions, or the reward cannot be called or fails for all of them.
    """
    if isinstance(reward, Reward) and reward_kwargs:
        raise ValueError("a Reward has its own reward_kwargs: give them inside of it")
    [named] = named_rewards([reward if isinstance(reward, Reward) else Reward(reward, reward_kwargs or {})])
    samples = RunRecords(run).samples() if file is None else _predictions(Path(file))
    if not any(sample.completion for sample in samples):
        raise ValueError(f"run={run!r} has no saved completions: tune by reward with validation, or give --file")
    columns = columns_of_samples(Path(run), samples, predicted=file is not None)
    steps = sorted({sample.step for sample in samples})
    results = [_rescored(named, run, [sample for sample in samples if sample.step == step], columns) for step in steps]
    console = Console()
    console.print(described_reward(named, results[0].rows.batch.columns))
    console.print(_table_of_steps(steps, results, samples))
    for line in summary(results[-1]):
        console.print(Text(line))
    for checked in results:
        _refuse_if_all_failed(checked)
    if output is not None:
        _write(Path(output), steps, results)
        console.print(Text(f"Written: {output}"))
    return results


# -- rows --------------------------------------------------------------------------------------------------------------


def _rows(found: Sequence[Row], prompt: str | None, completion: str | None) -> Rows:
    """Rows of a file; their completions are empty where a model is to write them."""
    if completion is not None and completion not in found[0]:
        raise ValueError(
            f"completion={completion!r} is no column of the data; they are {', '.join(found[0])}. Name the column that "
            "holds completions with --completion, or let a model write them with --model"
        )
    prompts = _prompts(found, prompt)
    if completion is None and not any(prompts):
        raise ValueError("a model needs prompts: give a template with --prompt, such as 'Question: {question}'")
    completions = [""] * len(found) if completion is None else [_as_text(row[completion]) for row in found]
    # A column `completion` that is scored is the model's part: a run's data would not have it.
    given = [name for name in found[0] if not name == completion == _COMPLETION]
    columns = {name: tuple(row[name] for row in found) for name in given}
    batch = Batch(tuple(range(len(found))), prompts, None, None, None, columns)
    return Rows(batch, completions, extras=_about(step=0, run="check"))


def _about(step: int, run: str) -> dict[str, Any]:
    """What a reward may ask of a run."""
    return {"trainer_state": SimpleNamespace(global_step=step, max_steps=step), "step": step, "run": run}


def _prompts(found: Sequence[Row], prompt: str | None) -> tuple[str, ...]:
    if prompt is None:
        return tuple(_as_text(row.get(_PROMPT) or "") for row in found)
    template = Template("prompt", prompt)
    template.check(found[0])
    return tuple(template.fill(row, place).strip(" ") for place, row in enumerate(found))


def _refuse_tokens_without_any(reward: NamedReward, rows: Rows) -> None:
    if rows.completion_ids is None and "completion_ids" in reward.convention.parameters.needed:
        raise ValueError(
            f"Reward {reward.name} needs completion_ids, the tokens of a completion, which a file does not have: let a "
            "model write completions with --model"
        )


def _as_text(value: Any) -> str:
    """A column's value; of a list of messages, the last one's content."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping) and "content" in value[-1]:
        value = value[-1]["content"]
    return value if isinstance(value, str) else str(value)


def _completed(rows: Rows, model: str, completer: Completer, encoding: Encoding) -> Rows:
    pretrained = Pretrained(model)
    loaded = pretrained.load(torch.float32)
    bound = completer.bind(loaded, encoding.bind(loaded, pretrained.load_tokenizer()))
    bound.check(rows.batch)
    said = bound.complete(rows.batch, seed=0)
    return Rows(rows.batch, said.texts, said.ids, said.finish_reasons, rows.extras)


def _predictions(path: Path) -> list[SampleRecord]:
    if not path.is_file():
        raise FileNotFoundError(f"file={str(path)!r} does not exist; `mezo predict` writes predictions.jsonl")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    try:
        return [SampleRecord(0, row["index"], row["prompt"], row["completion"], row["metrics"]) for row in lines]
    except KeyError as error:
        raise ValueError(f"file={str(path)!r} holds no predictions: {error} is missing in one of its lines") from error


def _rescored(reward: NamedReward, run: str, samples: Sequence[SampleRecord], columns: Columns) -> Checked:
    index = tuple(sample.index for sample in samples)
    of_rows = {name: tuple(values[place] for place in index) for name, values in columns.items()}
    batch = Batch(index, tuple(sample.prompt for sample in samples), None, None, None, of_rows)
    about = _about(samples[0].step, Path(run).resolve().name)
    return ask(reward, Rows(batch, [sample.completion for sample in samples], extras=about))


# -- results -----------------------------------------------------------------------------------------------------------


def _refuse_if_all_failed(checked: Checked) -> None:
    if len(checked.failures) == len(checked.values):
        cause = checked.failures[0]
        raise ValueError(
            f"Reward {checked.reward.name} failed for every row: {type(cause).__name__}: {cause}"
        ) from cause


def _table_of_steps(steps: Sequence[int], results: Sequence[Checked], samples: Sequence[SampleRecord]) -> Table:
    name = results[0].reward.name
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("step", "completions", name, "the run's own reward", "none", "failed"):
        table.add_column(title, justify="right")
    for step, checked in zip(steps, results, strict=True):
        own = [sample.metrics.get("reward", math.nan) for sample in samples if sample.step == step]
        known = [value for value in own if value is not None and math.isfinite(value)]
        cells = (
            str(step),
            str(len(checked.values)),
            number(statistics.fmean(checked.numbers)) if checked.numbers else "n/a",
            number(statistics.fmean(known)) if known else "n/a",
            str(sum(value is None for value in checked.values)),
            str(len(checked.failures)),
        )
        table.add_row(*cells)
    return table


def _write(path: Path, steps: Sequence[int], results: Sequence[Checked]) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for step, checked in zip(steps, results, strict=True):
            batch = checked.rows.batch
            for place, value in enumerate(checked.values):
                more: dict[str, Any] = {"notes": checked.beside[place]} if checked.beside[place] else {}
                if isinstance(value, Exception):
                    more["failed"] = f"{type(value).__name__}: {value}"
                line = {
                    "step": step,
                    "index": batch.index[place],
                    "prompt": batch.prompts[place],
                    "completion": checked.rows.completions[place],
                    "value": None if isinstance(value, Exception) else value,
                }
                file.write(json.dumps(line | more, allow_nan=False) + "\n")
