"""The weights of a ZeRO-3 run on disk: every rank writes its pieces, and any number of ranks reads them back.

A checkpoint is a small file, and a folder of weights that it names::

    checkpoints/last.ckpt                                           whatever is small
    checkpoints/weights/last.ckpt-40-5f0c91d2/rank-00000-of-00002.safetensors
                                              rank-00001-of-00002.safetensors

No two saves share a folder, and the small file is put in place at once, when all ranks have written their weights. A
full disk, or a kill at any moment, therefore leaves the checkpoint that was there before. What a killed save left
behind is removed by the next one to the same name. The folders have a folder of their own because Lightning takes
whatever lies beside ``hpc_ckpt_1.ckpt`` and is called alike for a checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mezo_lightning.interrupts import uninterrupted
from mezo_lightning.processes.ranks import Ranks
from mezo_lightning.sharding.weight_files import WeightFiles
from mezo_lightning.shards import Shard, whole_shape

_FOLDERS = "weights"
_BESIDE = "beside/"  # before the names of what rounding or an update keeps; parameters have no slash in theirs
_RANK_FILE = re.compile(r"rank-(\d{5,})-of-(\d{5,})\.safetensors")
_CHUNK = 1 << 24  # elements that are read at once


# -- a checkpoint: written as a whole, or not at all -------------------------------------------------------------------


def save_beside(
    path: str | os.PathLike[str],
    step: int,
    ranks: Ranks,
    pieces: Mapping[str, Shard],
    beside: Mapping[str, Tensor],
    write_small: Callable[[Path, str], None],
) -> None:
    """Save a checkpoint whose weights lie beside it; all ranks call this together.

    Signals wait until it is done. On any error the checkpoint that was there before stays as it was.

    Args:
        path: The small file; an earlier one is replaced, and its weights are removed.
        step: Steps that the weights have made, for the name of their folder.
        ranks: The processes of the job; their disk must be the same.
        pieces: This rank's piece of every weight by name, empty ones too.
        beside: What rounding or an update keeps beside them, by the same names and [n, ...] for a piece of [n]; empty
            ones may be missing.
        write_small: Called on rank zero only: writes the small file to a path that it is given, with the name of the
            folder, its second argument, in it.

    Raises:
        ValueError: If the path is none of a local disk, or the ranks do not share it.
        OSError: If a file cannot be written; RankError on the other ranks.
    """
    if "://" in str(path):
        raise ValueError(f"{path} is on no local disk; sharded weights need one, so set run_dir to a folder on one")
    path = Path(path)
    with uninterrupted():
        names = ranks.gather(lambda: f"{path.name}-{step}-{secrets.token_hex(4)}")
        folder = path.parent / _FOLDERS / names[0]
        try:
            ranks.together(lambda: write_shards(folder, ranks.rank, ranks.world_size, pieces, beside))
        except Exception:
            if ranks.rank == 0:
                _remove_folder(folder)
            raise
        ranks.together(lambda: _commit(path, folder, ranks.world_size, write_small) if ranks.rank == 0 else None)


def weights_folder(path: str | os.PathLike[str], recorded: str) -> Path:
    """The folder of weights that a checkpoint names.

    Args:
        path: The small file, or a link to it.
        recorded: The name in it.

    Raises:
        FileNotFoundError: If it is not there.
    """
    assert Path(recorded).name == recorded, recorded
    folders = [near.parent / _FOLDERS / recorded for near in (Path(path), Path(path).resolve())]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"{path} has its weights in {folders[-1]}, which is not there: the two go together")


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a checkpoint and its weights; rank zero calls this."""
    path = Path(path)
    path.unlink(missing_ok=True)
    _sync_folder(path.parent)
    _remove_others(path, keep="")


def _commit(path: Path, folder: Path, world_size: int, write_small: Callable[[Path, str], None]) -> None:
    """Put the small file in place; nothing after that may fail, for then the weights are in use."""
    partial = folder / "partial.ckpt"
    try:
        _rank_files(folder, world_size)
        write_small(partial, folder.name)
        _sync(partial)
        os.replace(partial, path)
    except BaseException:
        _remove_folder(folder)
        raise
    _sync_folder(path.parent)
    _remove_others(path, keep=folder.name)


def _remove_others(path: Path, keep: str) -> None:
    """Remove the folders that saves to a path made, but one."""
    own = re.compile(re.escape(path.name) + r"-\d+-[0-9a-f]{8}")
    with suppress(FileNotFoundError):
        for folder in list((path.parent / _FOLDERS).iterdir()):
            if own.fullmatch(folder.name) and folder.name != keep:
                _remove_folder(folder)


def _remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # there are others in it
        folder.parent.rmdir()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every file system knows of this for folders
        _sync(folder)


# -- the files of a folder ---------------------------------------------------------------------------------------------


def write_shards(
    folder: str | os.PathLike[str],
    rank: int,
    world_size: int,
    pieces: Mapping[str, Shard],
    beside: Mapping[str, Tensor],
) -> None:
    """Write one rank's file; it appears complete or not at all.

    Args:
        folder: Where all ranks write to; it is made if it is not there.
        rank: This process.
        world_size: How many there are; the folder is complete when all their files are there.
        pieces: This rank's piece of every weight by name, empty ones too.
        beside: What rounding or an update keeps beside them, by the same names and [n, ...] for a piece of [n]; empty
            ones may be missing.

    Raises:
        OSError: If the file cannot be written.
    """
    for name, state in beside.items():
        assert state.shape[:1] == pieces[name].shape, (name, state.shape, pieces[name].shape)
    tensors = {name: piece.data for name, piece in pieces.items()}
    tensors |= {_BESIDE + name: state for name, state in beside.items()}
    places = {name: [piece.begin, list(piece.whole)] for name, piece in pieces.items()}
    path = Path(folder) / f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    try:
        save_file(tensors, partial, {"places": json.dumps(places)})
        _sync(partial)
        os.replace(partial, path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


@dataclass(frozen=True)
class _Held:
    """Elements [begin, begin + numel) of a flattened weight, as a flat tensor of a file."""

    begin: int
    numel: int
    tensor: Any

    def read(self, begin: int, end: int) -> Tensor:
        """Those of elements [begin, end) of the weight that are here; the memory is that of the file."""
        with torch.device("cpu"):  # safetensors heeds a default, such as Lightning's
            return self.tensor[max(begin - self.begin, 0) : max(min(end - self.begin, self.numel), 0)]


class ShardFiles(WeightFiles):
    """The weights that the ranks of a job wrote, however many they were.

    Args:
        folder: What ``write_shards`` wrote to.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If a file is damaged, or the files together do not hold every element once.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)
        self._shapes: dict[str, torch.Size] = {}
        self._held: dict[str, list[_Held]] = {}
        for path in _rank_files(self._folder):
            self._add(path)
        for name, held in self._held.items():
            self._check(name, held)
        self.beside = frozenset(name.removeprefix(_BESIDE) for name in self._held if name.startswith(_BESIDE))
        """The names of the weights beside which something is kept."""

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a weight."""
        return self._find(name)[0].read(0, 0).dtype

    def read(self, name: str, begin: int, end: int) -> Tensor:
        return self._read(name, begin, end)

    def read_beside(self, name: str, begin: int, end: int) -> Tensor:
        """What is kept beside elements [begin, end) of a flattened weight: [end - begin, ...] on the CPU."""
        return self._read(_BESIDE + name, begin, end)

    def _read(self, name: str, begin: int, end: int) -> Tensor:
        held = [piece for piece in self._find(name) if piece.begin < end and begin < piece.begin + piece.numel]
        # A copy, also of a single part: what safetensors hands out is the memory of its file.
        return torch.cat([piece.read(begin, end) for piece in held or self._find(name)[:1]])

    def _find(self, name: str) -> list[_Held]:
        if name not in self._held:
            raise ValueError(f"{self._folder} does not hold {name!r}")
        return self._held[name]

    def _add(self, path: Path) -> None:
        try:
            file = safe_open(path, "pt")
            places = json.loads(file.metadata()["places"])
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged, or no file of weights: {error}") from error
        for key in file.keys():  # noqa: SIM118  (no mapping)
            begin, whole = places[key.removeprefix(_BESIDE)]
            tensor = file.get_slice(key)
            self._held.setdefault(key, []).append(_Held(begin, tensor.get_shape()[0], tensor))
            if not key.startswith(_BESIDE) and self._shapes.setdefault(key, torch.Size(whole)) != torch.Size(whole):
                raise ValueError(f"{path} has {key!r} as {whole}, another rank's as {list(self._shapes[key])}")

    def _check(self, name: str, held: list[_Held]) -> None:
        """Make sure that the pieces, which get sorted, are the whole."""
        held.sort(key=lambda piece: piece.begin)
        numel = self._shapes[name.removeprefix(_BESIDE)].numel()
        spans = [(piece.begin, piece.begin + piece.numel) for piece in held if piece.numel]
        at = 0
        for begin, end in [*spans, (numel, numel)]:
            if begin != at:
                wrong = "lacks" if begin > at else "holds twice"
                raise ValueError(f"{self._folder} {wrong} elements {min(at, begin)} to {max(at, begin)} of {name!r}")
            at = end


def read_shards(files: ShardFiles, pieces: Mapping[str, Tensor], beside: Mapping[str, Tensor]) -> None:
    """Fill pieces, or whole weights, and what rounding keeps beside them; nothing is changed if they do not fit.

    Args:
        files: What to read.
        pieces: All weights of a model by name: a ``Shard`` where this process holds a piece only.
        beside: What is kept beside them here, [n, ...] for a piece of [n].

    Raises:
        ValueError: If names, shapes or dtypes differ from those in the files.
    """
    for name, piece in pieces.items():
        if name not in files.shapes:
            raise ValueError(f"the checkpoint does not have the weight {name!r} of this model")
        found, wanted = (files.shapes[name], files.dtype(name)), (whole_shape(piece), piece.dtype)
        if found != wanted:
            raise ValueError(f"the checkpoint has {name!r} as {_words(*found)}, this model as {_words(*wanted)}")
    for name in files.shapes.keys() - pieces.keys():
        raise ValueError(f"the checkpoint has a weight {name!r}, which this model does not have")
    for name in beside.keys() - files.beside:
        raise ValueError(f"the checkpoint has nothing beside the weight {name!r}: it was tuned with another rounding")
    with torch.no_grad():
        for name, piece in pieces.items():
            for part, begin in _parts(piece.data.view(-1), piece):
                part.copy_(files.read(name, begin, begin + part.numel()))
        for name, state in beside.items():
            for part, begin in _parts(state, pieces[name]):
                part.copy_(files.read_beside(name, begin, begin + len(part)))


def _parts(flat: Tensor, piece: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Parts of what this process holds, and where each begins in the whole."""
    start = piece.begin if isinstance(piece, Shard) else 0
    for begin in range(0, len(flat), _CHUNK):
        yield flat[begin : begin + _CHUNK], start + begin


def _words(shape: torch.Size, dtype: torch.dtype) -> str:
    return f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"


def _rank_files(folder: Path, world_size: int | None = None) -> list[Path]:
    """The files of all ranks, in their order.

    Args:
        folder: Where they are.
        world_size: How many there have to be; None: as many as their names say.
    """
    found = {path.name: match for path in folder.iterdir() if (match := _RANK_FILE.fullmatch(path.name))}
    sizes = {int(match[2]) for match in found.values()} | ({world_size} if world_size else set())
    if not sizes:
        raise FileNotFoundError(f"{folder} holds no weights")
    if len(sizes) > 1:
        raise ValueError(f"{folder} holds files of jobs of {' and of '.join(map(str, sorted(sizes)))} ranks")
    size = sizes.pop()
    names = [f"rank-{rank:05d}-of-{size:05d}.safetensors" for rank in range(size)]
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: not all ranks wrote to the same disk, or it was copied in part"
        )
    return [folder / name for name in names]
