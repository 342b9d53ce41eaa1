"""Lightning checkpoints of sharded runs: written piece by piece, and read on any number of processes.

Lightning's own checkpoint holds the whole state in one file, and that is what one process and ``replicated`` write. A
ZeRO-3 run writes the same file without weights, and beside it a folder of shards (``shard_files.py``) that
``checkpoint["mezo"]["weights"]`` names. Either kind is read by either strategy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mezo_lightning.optimizer import MeZO
from mezo_lightning.processes.ranks import Ranks
from mezo_lightning.sharding.shard_files import ShardFiles, read_shards, save_beside, weights_folder
from mezo_lightning.shards import Shard

_PREFIX = "model."  # of the Hugging Face model within the LightningModule
_path: ContextVar[str | None] = ContextVar("path of the checkpoint that is being loaded", default=None)


@contextmanager
def loading(path: Any) -> Iterator[None]:
    """Say what ``load_from_checkpoint`` loads, which Lightning does not tell the module."""
    token = _path.set(str(path))
    try:
        yield
    finally:
        _path.reset(token)


def save_sharded(
    checkpoint: dict[str, Any],
    path: str | os.PathLike[str],
    ranks: Ranks,
    pieces: Mapping[str, Shard],
    write: Callable[[dict[str, Any], Path], None],
) -> None:
    """Save a checkpoint whose weights are cut up; all ranks call this together.

    Args:
        checkpoint: What Lightning would save, without weights; changed.
        path: The file.
        ranks: The processes of the job.
        pieces: This rank's pieces of all weights, by their names in the Hugging Face model.
        write: Writes a checkpoint to a path.
    """
    beside: dict[str, Tensor] = {}
    for state in checkpoint.get("optimizer_states", ()):
        beside |= state.pop("beside")

    def write_small(place: Path, folder: str) -> None:
        checkpoint["mezo"]["weights"] = folder
        write(checkpoint, place)

    save_beside(path, checkpoint["global_step"], ranks, pieces, beside, write_small)


def read_weights(checkpoint: Mapping[str, Any], path: str, pieces: Mapping[str, Tensor]) -> None:
    """Fill this rank's pieces of all weights.

    Args:
        checkpoint: What ``path`` holds.
        path: The file.
        pieces: By their names in the Hugging Face model.

    Raises:
        ValueError: If the checkpoint is of another model.
    """
    files = _files(checkpoint, path)
    if files is not None:
        read_shards(files, pieces, {})
        return
    for name, piece in pieces.items():
        whole: Tensor | None = checkpoint["state_dict"].get(_PREFIX + name)
        assert isinstance(piece, Shard)
        if whole is None or whole.shape != piece.whole:
            found = "not at all" if whole is None else f"with the shape {tuple(whole.shape)}"
            raise ValueError(
                f"the checkpoint {path} has the weight {name!r} {found}, but this model has it with the shape "
                f"{tuple(piece.whole)}"
            )
        piece.data.copy_(whole.reshape(-1)[piece.begin : piece.begin + piece.numel()])


def optimizer_state(checkpoint: Mapping[str, Any], path: str, optimizer: MeZO) -> dict[str, Any]:
    """The optimizer's state as this rank needs it, with its pieces of what is kept beside the weights."""
    files = _files(checkpoint, path)
    [state] = checkpoint["optimizer_states"]
    beside = {}
    for piece in optimizer.space.slices:
        name, begin, end = piece.info.name, piece.begin, piece.begin + len(piece)
        if files is None and name in state["beside"]:
            beside[name] = state["beside"][name][begin:end]
        elif files is not None and name in files.beside:
            beside[name] = files.read_beside(name, begin, end)
    return {**state, "beside": beside}


def put_together(checkpoint: dict[str, Any], path: str | None, model: nn.Module) -> None:
    """Put whole weights into a checkpoint that has them beside it, as one process needs them.

    Args:
        checkpoint: What the file holds; changed.
        path: The file; None where only ``loading`` knows it.
        model: The Hugging Face model, whose tied weights go by several names.

    Raises:
        ValueError: If nobody knows where the file is.
    """
    if "weights" not in checkpoint["mezo"]:
        return
    path = path or _path.get()
    if path is None:
        raise ValueError(
            "the checkpoint has its weights beside it, in the folder that it was loaded from; load it by its path"
        )
    files = _files(checkpoint, path)
    assert files is not None
    first = {parameter: name for name, parameter in model.named_parameters()}
    weights = {name: files.read(name, 0, shape.numel()).view(shape) for name, shape in files.shapes.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first[parameter] in weights:
            checkpoint["state_dict"][_PREFIX + name] = weights[first[parameter]]
    for state in checkpoint.get("optimizer_states", ()):
        state["beside"] = {name: files.read_beside(name, 0, files.shapes[name].numel()) for name in files.beside}


def load_small(path: str, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint; whole weights in it stay on disk until they are used.

    Args:
        path: The file.
        weights_only: Whether to take data only and no code; None: only data.
    """
    return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only is not False)


def _files(checkpoint: Mapping[str, Any], path: str) -> ShardFiles | None:
    folder = checkpoint["mezo"].get("weights")
    return None if folder is None else ShardFiles(weights_folder(path, folder))
