"""The safetensors files of a pre-trained model, any piece of them under the names that the model has for its weights.

Files often name weights otherwise than the model: without the prefix of the base model (``decoder.layers.0.fc1.weight``
for ``model.decoder.layers.0.fc1.weight``), as an older release of transformers did, or only one of several that are
tied. Which weight a name stands for is asked of transformers, so that it is the one that ``from_pretrained`` takes.
What transformers computes weights from (experts of a mixture, say, that it stacks) cannot be read piece by piece.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from mezo_lightning.models.pretrained import PICKLES, Pretrained
from mezo_lightning.sharding.weight_files import WeightFiles

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_CHUNK = 1 << 22  # elements that are compared at once


@dataclass(frozen=True)
class Place:
    """Where a weight lies."""

    file: Path
    """The safetensors file."""
    key: str
    """Its name in the file."""


class PretrainedFiles(WeightFiles):
    """The weights of a model, parameters and persistent buffers, in a folder of safetensors files.

    Args:
        folder: Where the files are: model.safetensors, those that model.safetensors.index.json names, or all.
        model: The model that they are of. Only the names and shapes of its weights are looked at.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If a file is damaged, or a weight is missing, or has another shape, or is there twice.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        self._folder = folder
        self._opened = {path: _open(path) for path in safetensors_files(folder)}
        self._weights: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._places = self._find(model)
        for names in _tied(self._weights):
            self._settle(names, type(model).__name__)

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return {name: weight.shape for name, weight in self._weights.items()}

    @property
    def places(self) -> Mapping[str, Place]:
        """Where each weight lies, by all of its names."""
        return self._places

    def read(self, name: str, begin: int, end: int) -> Tensor:
        # The memory of the file itself, and not a copy: among pieces that stay, copies would leave holes.
        place, shape = self._places[name], self._weights[name].shape
        assert 0 <= begin <= end <= shape.numel(), (name, begin, end)
        row = max(shape[1:].numel(), 1)
        first = begin // row
        with torch.device("cpu"):  # safetensors heeds a default, such as Lightning's
            if not shape:  # has no rows
                values = self._opened[place.file].get_tensor(place.key)
            else:
                values = self._opened[place.file].get_slice(place.key)[first : -(-end // row)]
        return values.reshape(-1)[begin - first * row : end - first * row]

    def _find(self, model: PreTrainedModel) -> dict[str, Place]:
        """Where the files hold which of the model's names."""
        places: dict[str, Place] = {}
        naming = _Naming(model, self._weights)
        for place in self._places_in_files():
            name = naming.name_of(place)
            if name is None:
                continue
            if name in places:
                raise ValueError(
                    f"{places[name].file} holds {places[name].key!r}, and {place.file} holds {place.key!r}: both are "
                    f"{name!r} of {type(model).__name__}; remove one of them"
                )
            places[name] = place
        return places

    def _places_in_files(self) -> Iterator[Place]:
        for path, file in self._opened.items():
            for key in sorted(file.keys()):
                yield Place(path, key)

    def _settle(self, names: Sequence[str], owner: str) -> None:
        """Check a weight that the model knows by several names, and have all of them stand for what was found."""
        found = [name for name in names if name in self._places]
        if not found:
            raise ValueError(
                f"{self._folder} holds no weight {' or '.join(map(repr, names))}, which {owner} has. If it is complete "
                f"all the same, {_SAVE_AGAIN}"
            )
        for name in found:
            place = self._places[name]
            shape = torch.Size(self._opened[place.file].get_slice(place.key).get_shape())
            if shape != self._weights[name].shape:
                raise ValueError(
                    f"{place.file} holds {place.key!r} as {tuple(shape)}, but config.json makes it "
                    f"{tuple(self._weights[name].shape)}: they are not of one model"
                )
        for other in found[1:]:
            if not self._equal(found[0], other):
                raise ValueError(
                    f"{self._folder} holds {found[0]!r} and {other!r}, which {owner} ties, with different values; set "
                    "tie_word_embeddings to false in config.json"
                )
        self._places |= {name: self._places[found[0]] for name in names if name not in found}

    def _equal(self, one: str, other: str) -> bool:
        numel = self._weights[one].numel()
        spans = [(begin, min(begin + _CHUNK, numel)) for begin in range(0, numel, _CHUNK)]
        return all(torch.equal(self.read(one, *span), self.read(other, *span)) for span in spans)


_SAVE_AGAIN = (
    "load it once in one process and save it in the layout that it runs in: "
    "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder, save_original_format=False). Or use "
    "--trainer.strategy replicated"
)


class _Naming:
    """Which weight of a model a name in a file stands for, as transformers has it."""

    def __init__(self, model: PreTrainedModel, weights: Mapping[str, Tensor]):
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._weights = dict(weights)

    def name_of(self, place: Place) -> str | None:
        """The model's name; None where the model has no such weight."""
        name, pattern = rename_source_key(place.key, self._renamings, self._converters, self._prefix, self._weights)
        if name not in self._weights and place.key in self._weights:  # a pattern fits what needs no renaming
            name, pattern = place.key, None
        if name not in self._weights:
            return None
        if pattern is not None:
            raise ValueError(
                f"{place.file} holds {place.key!r}, from which transformers computes {name!r}: that cannot be read "
                f"piece by piece; {_SAVE_AGAIN}"
            )
        return name


def base_folder(pretrained: Pretrained) -> Path:
    """The folder with a model's safetensors files, downloaded first where they are on the Hub and not in its cache.

    Raises:
        ValueError: If the weights are in a GGUF file, a .bin file or an adapter.
        FileNotFoundError: If there are none.
    """
    source, gguf_file = pretrained.locate()
    if gguf_file is not None:
        raise ValueError(
            f"name={pretrained.name!r} is a GGUF file, from which transformers computes weights: they cannot be read "
            "piece by piece. Save them as safetensors once, Pretrained(...).load() and models.export(...), "
            "and give that folder, or use --trainer.strategy replicated"
        )
    folder = Path(source)
    if not folder.is_dir():
        folder = _download(source, pretrained.revision or "main")
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"name={pretrained.name!r} holds a PEFT adapter: merge it into its base and save that, or use "
            "--trainer.strategy replicated"
        )
    return folder


def safetensors_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights.

    Raises:
        FileNotFoundError: If one of them is not there.
    """
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    if (folder / _INDEX).is_file():
        paths = [folder / name for name in _indexed(folder)]
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is not there, but {_INDEX} names it: the model was copied in part")
        return paths
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no .safetensors weights")
    return paths


def _download(repository: str, revision: str) -> Path:
    """Fetch what is needed of a Hub repository: not what lies in folders, nor weights that the index does not name."""

    def fetch(patterns: Collection[str]) -> Path:
        return Path(
            snapshot_download(repository, revision=revision, allow_patterns=[*patterns], ignore_patterns=["*/*"])
        )

    folder = fetch(["*.json", "*.py"])
    folder = fetch(_indexed(folder) if (folder / _INDEX).is_file() else ["*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"name={repository!r} holds no .safetensors weights at revision {revision!r}, and as for .bin files: "
            f"{PICKLES}; or give the revision that holds them, such as refs/pr/1, where a pull request adds them"
        )
    return folder


def _indexed(folder: Path) -> list[str]:
    return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


def _open(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no file of weights: {error}") from error


def _tied(weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a model's weights, those of one weight together."""
    names: dict[int, list[str]] = {}
    for name, weight in weights.items():
        names.setdefault(id(weight), []).append(name)
    return list(names.values())
