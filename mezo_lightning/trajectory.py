"""The append-only log of a run's steps, from which the tuned weights can be rebuilt bit for bit.

A file is a header and then one record a step, 32 bytes for one query and one parameter group, 40 for two groups::

    header   b"MEZOTRAJ", version u16, length u32, JSON (parameter table, groups, sampler, rounding, base, what weight
             decay is towards unless that is zero, fingerprints of the tuned weights and of the frozen ones), crc32
    record   step u32, terms u16, groups u16, crc32 of these;
             groups x decay f32, groups x rate f32 where the header names a rule with dense moments,
             terms x (seed u64, groups x coefficient f32), crc32 of all before

All numbers are little-endian. Coefficients have 12 significant bits, so that f32 holds them exactly. A record that a
crash cut short at the end of the file is dropped with a warning; a wrong one anywhere else is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor, nn

from mezo_lightning.dense import Dense, dense_as_dict, dense_from_dict
from mezo_lightning.fingerprints import fingerprint_of, named_weights
from mezo_lightning.parameters import ParameterInfo, ParameterSpace
from mezo_lightning.rounding import RoundingName
from mezo_lightning.sampler_records import sampler_as_dict, sampler_from_dict
from mezo_lightning.samplers import Sampler
from mezo_lightning.shards import whole_shape
from mezo_lightning.steps import DecayTowards, Step

MAGIC = b"MEZOTRAJ"
MOST_TERMS = (1 << 16) - 1
"""Of a step: as many as a record can count."""
VERSION = 3
_PREFIX = struct.Struct("<8sHI")
_HEAD = struct.Struct("<IHH")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class Header:
    """What a trajectory belongs to, and how its steps are to be read."""

    table: tuple[ParameterInfo, ...]
    """Every tuned parameter of the unsharded model: name, shape, position, group."""
    sampler: Mapping[str, Any]
    """The distribution of directions: its name, and its settings."""
    rounding: RoundingName
    """How updates get into 16-bit weights."""
    dtypes: tuple[str, ...]
    """The dtype of each parameter in the table."""
    fingerprint: int
    """A hash of the tuned weights before the first step, so that another model of the same shape is refused."""
    base: Mapping[str, Any] = field(default_factory=dict)
    """Where the base weights come from, as far as the run knows."""
    decay_towards: DecayTowards = "zero"
    """What weight decay is towards."""
    frozen: int | None = None
    """A hash of all weights that are not tuned, see ``fingerprints.py``; None where it is not known."""
    update: Mapping[str, Any] = field(default_factory=dict)
    """The rule that keeps dense moments, its name and settings; empty where steps need none."""

    @classmethod
    def of(
        cls,
        space: ParameterSpace,
        base: Mapping[str, Any] | None = None,
        fingerprint: int | None = None,
        frozen: int | None = None,
    ) -> Header:
        """The header for a run that starts from the weights as they are now.

        Args:
            space: The parameters.
            base: Where the base weights come from.
            fingerprint: Of the tuned weights of the whole model, where the space holds only shards of it.
            frozen: Of the weights that are not tuned, by ``fingerprints.fingerprint_of``; None to accept any.
        """
        dtypes = {name: str(parameter.dtype).removeprefix("torch.") for name, parameter in space.parameters.items()}
        return cls(
            space.table,
            sampler_as_dict(space.sampler),
            space.rounding,
            tuple(dtypes[info.name] for info in space.table),
            space.fingerprint() if fingerprint is None else fingerprint,
            dict(base or {}),
            space.decay_towards,
            frozen,
            dense_as_dict(space.rule),
        )

    @property
    def num_groups(self) -> int:
        """Parameter groups that a record has a decay and coefficients for."""
        return max(info.group for info in self.table) + 1

    def to_json(self) -> bytes:
        """The header as it is written."""
        record = dataclasses.asdict(self)
        if self.decay_towards == "zero":
            del record["decay_towards"]  # such runs have the header that they always had
        if self.frozen is None:
            del record["frozen"]
        if not self.update:
            del record["update"]
        return json.dumps(record).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        """The inverse of ``to_json``."""
        fields = json.loads(text)
        table = tuple(
            ParameterInfo(row["name"], tuple(row["shape"]), row["start"], row["group"]) for row in fields["table"]
        )
        return cls(**{**fields, "table": table, "dtypes": tuple(fields["dtypes"])})

    def make_sampler(self) -> Sampler:
        """The sampler that was recorded."""
        return sampler_from_dict(self.sampler)

    def make_rule(self) -> Dense | None:
        """The rule with dense moments that was recorded, if there was one."""
        return dense_from_dict(self.update)


class Trajectory:
    """A trajectory file: created by a run, appended to by its optimizer, read by a replay.

    Use ``Trajectory.create`` or ``Trajectory.open``.
    """

    def __init__(self, path: Path, file: BinaryIO, header: Header, offsets: list[int]):
        self.path = path
        self.header = header
        self._rule = header.make_rule()
        self._file = file
        self._offsets = offsets  # where each record begins, and where the next one will

    @classmethod
    def create(cls, path: str | os.PathLike[str], header: Header) -> Trajectory:
        """Start a new file.

        Raises:
            FileExistsError: If there is one already: a log is never overwritten.
        """
        path = Path(path)
        file = path.open("x+b")
        text = header.to_json()
        head = _PREFIX.pack(MAGIC, VERSION, len(text)) + text
        file.write(head + _CRC.pack(zlib.crc32(head)))
        file.flush()
        return cls(path, file, header, [file.tell()])

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, append: bool = False) -> Trajectory:
        """Open a file, check every record, and drop one that was cut short at the end.

        Args:
            path: The file, or a run's folder with a ``trajectory.bin``.
            append: Whether more steps are to be appended; without, the file is not changed.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no trajectory, or damaged before its end.
        """
        path = Path(path)
        path = path / "trajectory.bin" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"there is no trajectory {path}")
        file = path.open("r+b" if append else "rb")
        try:
            header = _read_header(file, path)
            offsets = _scan(file, path, header.num_groups, 1 if header.make_rule() is None else 2)
        except ValueError:
            file.close()
            raise
        if append:
            file.truncate(offsets[-1])
        return cls(path, file, header, offsets)

    def check_base(self, fingerprint: int) -> None:
        """Raise ValueError unless these are the weights that the run tuned, as it found them."""
        if fingerprint != self.header.fingerprint:
            raise ValueError(
                f"{self.path} starts from other weights than this model has: the names and shapes are the same, "
                "the fingerprints are not; load the base model of the run"
            )

    def check_frozen(self, fingerprint: int) -> None:
        """Raise ValueError unless these are the weights that the run did not tune; a log that knows none takes any."""
        if self.header.frozen not in (None, fingerprint):
            raise ValueError(
                f"the frozen weights are not those of the run in {self.path}: this model has the weights that were "
                "tuned, but other ones beside them; load the base model of the run, with the versions of transformers "
                "and PEFT that it had"
            )

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __iter__(self) -> Iterator[Step]:
        for number in range(len(self)):
            yield self[number]

    def __getitem__(self, number: int) -> Step:
        number = range(len(self))[number]
        self._file.seek(self._offsets[number])
        record = self._file.read(self._offsets[number + 1] - self._offsets[number])
        return _unpack(record, self.header.decay_towards, self._rule)

    def append(self, step: Step) -> None:
        """Write a step; it is in the operating system's hands when this returns."""
        self._file.seek(self._offsets[-1])
        self._file.write(_pack(len(self), step))
        self._file.flush()
        self._offsets.append(self._file.tell())

    def truncate(self, steps: int) -> None:
        """Forget all steps after the first ``steps``, as a resume from an earlier checkpoint does.

        Raises:
            ValueError: If there are fewer steps than that.
        """
        if steps > len(self):
            raise ValueError(
                f"{self.path} has {len(self)} steps, but the checkpoint was written after step {steps}: "
                "they do not belong together, or the log was damaged"
            )
        self._file.truncate(self._offsets[steps])
        del self._offsets[steps + 1 :]

    def close(self) -> None:
        """Close the file; leaving a ``with`` block does it too."""
        self._file.close()

    def __enter__(self) -> Trajectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def replay(model: nn.Module, trajectory: Trajectory, *, stop: int | None = None) -> ParameterSpace:
    """Rebuild tuned weights in ``model``, which must hold the base weights, bit for bit.

    Args:
        model: The module whose parameters the trajectory names, with the base weights in the dtypes of the run.
        trajectory: The run.
        stop: Apply this many steps; None for all.

    Returns:
        The parameter space, its weights and whatever rounding keeps beside them as the run left them.

    Raises:
        ValueError: If the model is not the one that the run started from.
    """
    return replay_parameters(named_weights(model), trajectory, stop=stop)


def replay_parameters(
    parameters: Mapping[str, Tensor],
    trajectory: Trajectory,
    *,
    stop: int | None = None,
    sum_over_ranks: Callable[[int], int] = lambda fingerprint: fingerprint,
) -> ParameterSpace:
    """``replay`` on weights by name, among them ``Shard``s of a model that is cut up over several processes.

    Args:
        parameters: All weights by name, as the base has them: ``Placement.named_weights`` gives them.
        trajectory: The run.
        stop: Apply this many steps; None for all.
        sum_over_ranks: Adds up the fingerprints of shards.
    """
    header = trajectory.header
    stop = len(trajectory) if stop is None else stop
    if not 0 <= stop <= len(trajectory):
        raise ValueError(f"stop={stop}, but {trajectory.path} has {len(trajectory)} steps; give a number up to that")
    for info, dtype in zip(header.table, header.dtypes, strict=True):
        if info.name not in parameters:
            raise ValueError(f"{trajectory.path} tunes parameter {info.name!r}, which this model does not have")
        parameter = parameters[info.name]
        found = f"{tuple(whole_shape(parameter))} {str(parameter.dtype).removeprefix('torch.')}"
        if found != f"{info.shape} {dtype}":
            raise ValueError(
                f"{trajectory.path} has parameter {info.name!r} as {info.shape} {dtype}, this model has it as {found}"
            )
    space = ParameterSpace.of(
        [(info.name, parameters[info.name]) for info in header.table],
        [info.group for info in header.table],
        header.make_sampler(),
        header.rounding,
    )
    trajectory.check_base(sum_over_ranks(space.fingerprint()) % (1 << 64))
    if header.frozen is not None:
        frozen = fingerprint_of(parameters.items(), without=space.parameters)
        trajectory.check_frozen(sum_over_ranks(frozen) % (1 << 64))
    space.apply([trajectory[number] for number in range(stop)])
    return space


def _pack(number: int, step: Step) -> bytes:
    head = _HEAD.pack(number, len(step.terms), len(step.decays))
    floats = (*step.decays, *step.rates)
    record = head + _CRC.pack(zlib.crc32(head)) + struct.pack(f"<{len(floats)}f", *floats)
    for seed, coefficients in step.terms:
        record += struct.pack(f"<Q{len(coefficients)}f", seed, *coefficients)
    return record + _CRC.pack(zlib.crc32(record))


def _unpack(record: bytes, decay_towards: DecayTowards, rule: Dense | None) -> Step:
    number, terms, groups = _HEAD.unpack_from(record)
    at = _HEAD.size + _CRC.size
    floats = struct.unpack_from(f"<{groups if rule is None else 2 * groups}f", record, at)
    term = struct.Struct(f"<Q{groups}f")
    at += 4 * len(floats)
    unpacked = [term.unpack_from(record, at + i * term.size) for i in range(terms)]
    found = tuple((seed, tuple(coefficients)) for seed, *coefficients in unpacked)
    return Step(found, floats[:groups], number, decay_towards, rule, floats[groups:])


def _read_header(file: BinaryIO, path: Path) -> Header:
    prefix = file.read(_PREFIX.size)
    if len(prefix) < _PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is not a trajectory")
    _, version, length = _PREFIX.unpack(prefix)
    if version != VERSION:
        raise ValueError(f"{path} has format version {version}; this program reads version {VERSION}")
    text, crc = file.read(length), file.read(_CRC.size)
    if len(crc) < _CRC.size or _CRC.unpack(crc)[0] != zlib.crc32(prefix + text):
        raise ValueError(f"the header of {path} is damaged")
    return Header.from_json(text)


def _scan(file: BinaryIO, path: Path, groups: int, floats: int) -> list[int]:
    """Where the records begin, and where the next one will; ``floats`` numbers a group come before the terms."""
    begin, data = file.tell(), file.read()
    offsets, at = [begin], 0
    while at < len(data):
        number = len(offsets) - 1
        size = _record_size(data, at, number, groups, floats)
        if size is not None and at + size <= len(data) and _ends_in_crc(data[at : at + size]):
            at += size
            offsets.append(begin + at)
            continue
        # A crash leaves a part of one record, or a part and zeros that the file system had reserved.
        follows = data[at + (size or _HEAD.size + _CRC.size) :]
        if any(follows):
            raise ValueError(f"{path}: the record of step {number} is damaged, and there is more after it")
        warnings.warn(f"{path}: the record of step {number} was cut short and is dropped", stacklevel=3)
        break
    return offsets


def _record_size(data: bytes, at: int, number: int, groups: int, floats: int) -> int | None:
    """The size that the record at ``at`` says it has; None where its head is wrong."""
    head = data[at : at + _HEAD.size + _CRC.size]
    if len(head) < _HEAD.size + _CRC.size or not _ends_in_crc(head):
        return None
    found, terms, own_groups = _HEAD.unpack_from(head)
    if found != number or own_groups not in (0, groups):
        return None
    return len(head) + 4 * own_groups * floats + terms * (8 + 4 * own_groups) + _CRC.size


def _ends_in_crc(data: bytes) -> bool:
    return _CRC.unpack(data[-_CRC.size :])[0] == zlib.crc32(data[: -_CRC.size])
