"""From a run to a model: replay its trajectory on the base weights, or export one of its checkpoints.

Both go through the weights one file after another. Adapters, which are merged, and what transformers computes weights
from when it loads them (GGUF, say) need the whole model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

import mezo_lightning.resuming  # noqa: F401  (tells torch what may be in a checkpoint)
from mezo_lightning.fingerprints import fingerprint_of
from mezo_lightning.folders import new_folder
from mezo_lightning.models.pretrained import Pretrained, export
from mezo_lightning.parameters import ParameterInfo, ParameterSpace, Slice
from mezo_lightning.sharding.shard_files import ShardFiles, weights_folder
from mezo_lightning.sharding.streaming import Advance, Base, first_names, progress_bar, read_into, write_model
from mezo_lightning.sharding.weight_files import WeightFiles
from mezo_lightning.steps import Step
from mezo_lightning.trajectory import Header, Trajectory, replay

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM

_MODEL = "model."  # before the names of the Hugging Face model's weights in a checkpoint
_PIECE = 1 << 20  # elements that are tuned at once: what rounding keeps beside them is not needed after that


def replay_run(trajectory: Path, output: Path, steps: int | None = None, trust_remote_code: bool = False) -> None:
    """Rebuild tuned weights, bit for bit, from the base weights and a trajectory, as a Hugging Face folder.

    Args:
        trajectory: A run's folder, or its trajectory.bin.
        output: The folder to write; it must not exist yet, or be empty.
        steps: Replay this many steps; all by default.
        trust_remote_code: Run modelling code that comes with the base checkpoint.

    Raises:
        ValueError: If the base weights that can be loaded are not those that the run started from.
    """
    with Trajectory.open(trajectory) as log, new_folder(Path(output)) as folder:
        if steps is not None and not 0 <= steps <= len(log):
            raise ValueError(f"steps={steps}: {log.path} has {len(log)} steps")
        if not log.header.base:
            raise ValueError(
                f"{log.path} does not say where its base weights come from; use mezo_lightning.replay(model, ...)"
            )
        pretrained = Pretrained(**{**log.header.base, "trust_remote_code": trust_remote_code})
        count = len(log) if steps is None else steps
        base = Base.open(pretrained, getattr(torch, log.header.dtypes[0]))
        if base is None or not _fits(log.header, base):
            fingerprint = _replay_whole(log, count, pretrained, folder)
        else:
            fingerprint = _replay_by_file(log, count, pretrained, base, folder)
        found = f"{count} of {len(log)} steps on {pretrained.name}"
    Console().print(f"Replayed {found}: {output} (fingerprint of the weights {fingerprint:016x})")


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face folder: safetensors and tokenizer, adapters merged.

    Args:
        checkpoint: A .ckpt file of a run.
        output: The folder to write; it must not exist yet, or be empty.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint={str(checkpoint)!r} is not a file")
    with new_folder(Path(output)) as folder:
        weights = CheckpointWeights(Path(checkpoint))
        base = Base.open(weights.pretrained, weights.dtype)
        if base is None:
            _export_whole(weights, folder)
        else:
            _export_by_file(weights, base, folder)
    Console().print(f"Exported {checkpoint}: {output}")


# -- replay ------------------------------------------------------------------------------------------------------------


def _fits(header: Header, base: Base) -> bool:
    """Whether a base has all that the run tuned; why not, ``trajectory.replay`` tells."""
    return len(set(header.dtypes)) == 1 and all(
        info.name in base.weights and tuple(base.weights[info.name].shape) == info.shape for info in header.table
    )


def _replay_whole(log: Trajectory, count: int, pretrained: Pretrained, folder: Path) -> int:
    model = pretrained.load(getattr(torch, log.header.dtypes[0]))
    space = replay(model, log, stop=count)
    export(model, pretrained.load_tokenizer(), folder)
    return space.fingerprint()


def _replay_by_file(log: Trajectory, count: int, pretrained: Pretrained, base: Base, folder: Path) -> int:
    tuning = Tuning(base, log.header)
    _check_base(log, base, tuning)
    steps = [log[number] for number in range(count)]
    with progress_bar(f"Replaying {count} steps", tuning.numel) as advance:
        write_model(base, pretrained.load_tokenizer(), folder, lambda name: tuning.tuned(name, steps, advance))
    return tuning.take_fingerprint()


def _check_base(log: Trajectory, base: Base, tuning: Tuning) -> None:
    tuned = {info.name for info in log.header.table}
    frozen = [] if log.header.frozen is None else [name for name in base.weights if name not in tuned]

    def read_frozen() -> Iterator[tuple[str, Tensor]]:
        for name in frozen:
            yield name, tuning.tuned(name, (), advance)
            advance(base.weights[name].numel())

    total = tuning.numel + sum(base.weights[name].numel() for name in frozen)
    with progress_bar("Checking the base weights", total) as advance:
        for info in log.header.table:
            tuning.tuned(info.name, (), advance)
        log.check_base(tuning.take_fingerprint())
        if log.header.frozen is not None:
            log.check_frozen(fingerprint_of(read_frozen()))


class Tuning:
    """Makes the steps of a run on weights of its base, one weight after another.

    Args:
        base: The base.
        header: What the run tuned.
    """

    def __init__(self, base: Base, header: Header):
        self.numel = sum(info.numel for info in header.table)
        """Weights that the run tuned."""
        self._base = base
        self._header = header
        self._infos = {info.name: info for info in header.table}
        self._sampler = header.make_sampler()
        self._fingerprint = 0

    def tuned(self, name: str, steps: Sequence[Step], advance: Advance) -> Tensor:
        """A weight after some steps; one that the run did not tune comes as it is, and ``advance`` is not told."""
        weights = read_into(torch.empty_like(self._base.weights[name], device="cpu"), self._base.files, name)
        info = self._infos.get(name)
        for piece in () if info is None else _pieces(info, weights):
            space = ParameterSpace([piece], self._header.table, self._sampler, self._header.rounding)
            space.apply(steps)
            self._fingerprint += space.fingerprint()
            advance(len(piece))
        return weights

    def take_fingerprint(self) -> int:
        """The fingerprint of all weights that came out since this was last asked for."""
        fingerprint, self._fingerprint = self._fingerprint % (1 << 64), 0
        return fingerprint


def _pieces(info: ParameterInfo, weights: Tensor) -> Iterator[Slice]:
    for begin in range(0, info.numel, _PIECE):
        yield Slice(info, weights, begin, min(_PIECE, info.numel - begin))


# -- export ------------------------------------------------------------------------------------------------------------


class CheckpointWeights(WeightFiles):
    """The weights of a checkpoint, by their names in the Hugging Face model: within its file, or where that says.

    Args:
        path: A .ckpt file.

    Raises:
        ValueError: If it is of something else.
        FileNotFoundError: If weights are missing.
    """

    def __init__(self, path: Path):
        try:
            small: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (RuntimeError, UnpicklingError) as error:
            raise ValueError(f"checkpoint={str(path)!r} cannot be read: {error}") from error
        if "mezo" not in small:
            raise ValueError(f"checkpoint={str(path)!r} is not the checkpoint of a run of mezo")
        self._path = path
        pretrained = small["hyper_parameters"]["pretrained"]
        self.pretrained = pretrained if isinstance(pretrained, Pretrained) else Pretrained(**pretrained)
        """What the run started from."""
        self.dtype: torch.dtype = getattr(torch, small["mezo"]["dtype"])
        """Of all parameters."""
        state: dict[str, Tensor] = small["state_dict"]
        self._within = {name[len(_MODEL) :]: weight for name, weight in state.items() if name.startswith(_MODEL)}
        folder = small["mezo"].get("weights")
        self._beside = None if folder is None else ShardFiles(weights_folder(path, folder))

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        within = {name: weight.shape for name, weight in self._within.items()}
        return within if self._beside is None else {**within, **self._beside.shapes}

    def read(self, name: str, begin: int, end: int) -> Tensor:
        if self._beside is not None and name in self._beside.shapes:
            return self._beside.read(name, begin, end)
        return self._within[name].reshape(-1)[begin:end]

    def check(self, model: CausalLM) -> None:
        """Make sure that these are the weights of a model.

        Raises:
            ValueError: If a parameter is missing, has another shape, or is not one of the model's.
        """
        shapes, own = self.shapes, model.state_dict(keep_vars=True)
        for name, parameter in model.named_parameters():
            if shapes.get(name) != parameter.shape:
                found = f"with the shape {tuple(shapes[name])}" if name in shapes else "not at all"
                raise ValueError(
                    f"{self._path} has the weight {name!r} {found}, but {self.pretrained.name} has it with the shape "
                    f"{tuple(parameter.shape)}"
                )
        for name in shapes.keys() - own.keys():
            raise ValueError(f"{self._path} has a weight {name!r}, which {self.pretrained.name} does not have")


def _export_whole(weights: CheckpointWeights, folder: Path) -> None:
    model = weights.pretrained.load(weights.dtype)
    weights.check(model)
    for name, weight in first_names(model).items():
        if name in weights.shapes:
            read_into(weight, weights, name)
    export(model, weights.pretrained.load_tokenizer(), folder)


def _export_by_file(weights: CheckpointWeights, base: Base, folder: Path) -> None:
    weights.check(base.model)

    def read(name: str) -> Tensor:
        out = torch.empty_like(base.weights[name], device="cpu")
        # Buffers are not tuned, and need not be in a checkpoint.
        read_into(out, weights if name in weights.shapes else base.files, name)
        advance(out.numel())
        return out

    with progress_bar("Exporting", sum(weight.numel() for weight in base.weights.values())) as advance:
        write_model(base, weights.pretrained.load_tokenizer(), folder, read)
