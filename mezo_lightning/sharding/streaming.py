"""A model written as a Hugging Face folder one file after another, in the memory of the largest file.

Weights are read, worked on and written without a model to hold them: of the model, only its names and shapes are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mezo_lightning.models.pretrained import Pretrained
from mezo_lightning.sharding.loading import empty_model
from mezo_lightning.sharding.pretrained_files import PretrainedFiles, base_folder
from mezo_lightning.sharding.weight_files import WeightFiles

MAX_FILE_BYTES = 2_000_000_000
"""No file gets larger, unless a single weight is."""
_CHUNK = 1 << 20  # elements that are read at once
_INDEX = "model.safetensors.index.json"

Advance = Callable[[int], None]
"""Told how many elements more are done."""


@dataclass(frozen=True)
class Base:
    """A pre-trained model whose weights stay in their files."""

    model: PreTrainedModel
    """The model without its weights: they are on the device "meta"."""
    files: PretrainedFiles
    """What holds its weights."""
    weights: Mapping[str, Tensor]
    """Parameters and persistent buffers by their first names in the model, for shape and dtype only."""

    @staticmethod
    def open(pretrained: Pretrained, dtype: torch.dtype) -> Base | None:
        """The base of a run, or None where there is no way around loading it whole.

        Args:
            pretrained: What to open.
            dtype: What its weights are to become.
        """
        if pretrained.adapter is not None:
            return None
        try:
            folder = base_folder(pretrained)
            model = empty_model(pretrained, dtype, folder)
            files = PretrainedFiles(folder, model)
        except (ValueError, RuntimeError) as error:  # of code that came with a model, too
            reason = str(error).split(". ")[0]  # what to do comes after that, and is for those who tune
            Console(stderr=True).print(f"Loading all weights at once: {reason}", markup=False, highlight=False)
            return None
        return Base(model, files, first_names(model))

    def key(self, name: str) -> str:
        """What the files call a weight."""
        return self.files.places[name].key


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, those that are tied once, by the names that ``named_parameters`` gives."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        found.setdefault(id(weight), (name, weight))
    return dict(found.values())


@torch.no_grad()
def read_into(out: Tensor, files: WeightFiles, name: str) -> Tensor:
    """Read a whole weight into ``out``, a contiguous tensor of its shape, which is returned."""
    flat = out.view(-1)
    for begin in range(0, flat.numel(), _CHUNK):
        part = flat[begin : begin + _CHUNK]
        part.copy_(files.read(name, begin, begin + part.numel()))
    return out


def write_model(base: Base, tokenizer: PreTrainedTokenizerBase, folder: Path, read: Callable[[str], Tensor]) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` opens, its weights named as in the base's files.

    Args:
        base: What to write, except for the values of weights.
        tokenizer: Its tokenizer.
        folder: Where to; see ``folders.new_folder``.
        read: Gives the value of a weight, in the shape and dtype that the base has it in. Each is asked for once, and
            kept until its file is written.
    """
    base.model.save_pretrained(folder, state_dict={})  # whatever is not a weight
    tokenizer.save_pretrained(folder)
    names = {base.key(name): name for name in base.weights}
    plan = split_torch_state_dict_into_shards(
        {key: base.weights[name] for key, name in names.items()},  # pyright: ignore[reportArgumentType]
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=MAX_FILE_BYTES,
    )
    for file, keys in plan.filename_to_tensors.items():
        save_file({key: read(names[key]) for key in keys}, folder / file, {"format": "pt"})
    if plan.is_sharded:
        parameters = sum(parameter.numel() for parameter in base.model.parameters())
        index = {
            "metadata": {"total_parameters": parameters, **plan.metadata},
            "weight_map": plan.tensor_to_filename,
        }
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Advance]:
    """Show how far a work of so many elements is."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done: progress.advance(task, done)
