"""Promise 3: base weights and the log give back the tuned weights bit for bit; and no damage goes unseen."""

import dataclasses
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mezo_lightning.fingerprints import fingerprint_of, named_weights
from mezo_lightning.optimizer import MeZO
from mezo_lightning.rounding import RoundingName
from mezo_lightning.samplers import Gaussian, Rademacher, Sampler, derive_seed
from mezo_lightning.steps import GradientEstimate, Step, round_coefficient, round_fp32
from mezo_lightning.trajectory import Header, Trajectory, replay

ROOT = Path(__file__).resolve().parents[2]
ROUNDINGS: list[RoundingName] = ["stochastic", "compensated", "master"]
KINDS = [(torch.float32, "stochastic"), *((d, r) for d in (torch.bfloat16, torch.float16) for r in ROUNDINGS)]
# pyright: reportArgumentType=false


def base(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(40, 24), nn.LayerNorm(24), nn.Linear(24, 40, bias=False))
    model[2].weight = model[0].weight
    model.append(nn.Linear(40, 3))
    model[1].bias.requires_grad_(False)
    return model.to(dtype)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.data.view(-1).view(torch.uint8) for parameter in model.parameters()])


def estimates(count: int, queries: int) -> Iterator[GradientEstimate]:
    """As a run makes them, with skipped steps and ties in between."""
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        grads = torch.randn(queries, generator=generator).mul(100).tolist()
        if step % 5 == 3:
            yield GradientEstimate(skipped="all samples failed")
        else:
            seeds = tuple(derive_seed(derive_seed(0, step), query) for query in range(queries))
            yield GradientEstimate(seeds, tuple([0.0] * queries if step % 5 == 1 else grads), 1 / queries)


def run(
    path: Path,
    dtype: torch.dtype = torch.float32,
    rounding: RoundingName = "stochastic",
    *,
    steps: int = 12,
    queries: int = 1,
    sampler: Sampler | None = None,
) -> tuple[MeZO, list[Tensor]]:
    """A run with decay and a schedule; the weights before it and after each step."""
    model = base(dtype)
    optimizer = MeZO(model.named_parameters(), lr=1e-5, weight_decay=10.0, rounding=rounding, sampler=sampler)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    weights = [flat(model)]
    frozen = fingerprint_of(named_weights(model).items(), without=optimizer.space.parameters)
    with closing(Trajectory.create(path, Header.of(optimizer.space, frozen=frozen))) as optimizer.trajectory:
        for estimate in estimates(steps, queries):
            optimizer.step(estimate=estimate)
            scheduler.step()
            weights.append(flat(model))
    return optimizer, weights


@pytest.mark.parametrize(("dtype", "rounding"), KINDS)
@pytest.mark.parametrize("queries", [1, 3])
def test_replay_gives_the_bits_of_the_run(tmp_path: Path, dtype: torch.dtype, rounding: RoundingName, queries: int):
    optimizer, weights = run(tmp_path / "t", dtype, rounding, queries=queries)
    assert not torch.equal(weights[0], weights[-1])
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        assert len(trajectory) == 12
        for stop in (None, 0, 1, 4, 5, 12):
            model = base(dtype)
            space = replay(model, trajectory, stop=stop)
            assert torch.equal(flat(model), weights[12 if stop is None else stop])
            if stop is None:
                for a, b in zip(space.stores, optimizer.space.stores, strict=True):
                    assert a.state is None or torch.equal(a.state, b.state)


def test_replay_knows_the_sampler(tmp_path: Path):
    _, weights = run(tmp_path / "t", sampler=Rademacher())
    _, others = run(tmp_path / "g", sampler=Gaussian())
    assert not torch.equal(weights[-1], others[-1])
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        replay(model := base(), trajectory)
    assert torch.equal(flat(model), weights[-1])


@pytest.mark.parametrize("kept", [5, 6])
def test_a_trajectory_may_begin_in_the_middle_of_a_run(tmp_path: Path, kept: int):
    """The random bits of rounding depend on the number of the step: the log's, not the optimizer's."""
    model = base(torch.bfloat16)
    optimizer = MeZO(model.named_parameters(), lr=1e-5)
    todo = list(estimates(12, 1))
    for estimate in todo[:kept]:
        optimizer.step(estimate=estimate)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with closing(Trajectory.create(tmp_path / "t", Header.of(optimizer.space))) as optimizer.trajectory:
        for estimate in todo[kept:]:
            optimizer.step(estimate=estimate)
    other = base(torch.bfloat16)
    other.load_state_dict(start)
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        replay(other, trajectory)
    assert torch.equal(flat(other), flat(model))


@pytest.mark.parametrize("stop", [-1, 13, 100])
def test_a_stop_beyond_the_run_is_refused(tmp_path: Path, stop: int):
    run(tmp_path / "t")
    with (
        closing(Trajectory.open(tmp_path / "t")) as trajectory,
        pytest.raises(ValueError, match=f"stop={stop}, but .* has 12 steps"),
    ):
        replay(base(), trajectory, stop=stop)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 5])
def test_a_step_of_one_query_costs_at_most_64_bytes(tmp_path: Path, groups: int):
    parameters = [(f"p{i}", nn.Parameter(torch.zeros(3))) for i in range(groups)]
    optimizer = MeZO([{"params": [parameter]} for parameter in parameters], lr=1e-3)
    path = tmp_path / "t"
    with closing(Trajectory.create(path, Header.of(optimizer.space))) as optimizer.trajectory:
        size = path.stat().st_size
        for step in range(10):
            optimizer.step(estimate=GradientEstimate((derive_seed(0, step),), (1.0,)))
    assert (path.stat().st_size - size) / 10 == 24 + 8 * groups <= 64


COEFFICIENTS = st.floats(-1e20, 1e20).map(round_coefficient)


@settings(derandomize=True, max_examples=50, deadline=None)
@given(data=st.data(), groups=st.integers(1, 4))
def test_any_step_comes_back_as_it_was(data: st.DataObject, groups: int, tmp_path_factory: pytest.TempPathFactory):
    terms = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.tuples(*[COEFFICIENTS] * groups)), min_size=1, max_size=4)
    decays = st.tuples(*[st.floats(0, 1).map(round_fp32)] * groups)
    steps = data.draw(st.lists(st.one_of(st.just(Step()), st.builds(Step, terms.map(tuple), decays)), max_size=6))
    optimizer = MeZO([{"params": [nn.Parameter(torch.zeros(3))]} for _ in range(groups)])
    path = tmp_path_factory.mktemp("t") / "t"
    with closing(Trajectory.create(path, Header.of(optimizer.space, {"name": "ä"}))) as trajectory:
        for step in steps:
            trajectory.append(step)
        assert list(trajectory) == steps
    with closing(Trajectory.open(path)) as trajectory:
        assert list(trajectory) == steps
        assert [step.number for step in trajectory] == list(range(len(steps)))
        assert trajectory.header.base == {"name": "ä"}


# -- the wrong model ---------------------------------------------------------------------------------------------------


def test_other_weights_of_the_same_shape_are_refused_and_left_alone(tmp_path: Path):
    run(tmp_path / "t")
    other = base(seed=1)
    before = flat(other)
    one_bit = base()
    one_bit.get_parameter("3.bias").data.view(torch.int32)[0] ^= 1
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        for model in (other, one_bit):
            with pytest.raises(ValueError, match=r"starts from other weights.*fingerprints are not"):
                replay(model, trajectory)
        # Replaying twice is replaying onto other weights.
        replay(model := base(), trajectory)
        with pytest.raises(ValueError, match="starts from other weights"):
            replay(model, trajectory)
    assert torch.equal(flat(other), before)


def test_other_frozen_weights_are_refused_unless_the_log_does_not_know_them(tmp_path: Path):
    _, weights = run(tmp_path / "t")
    other = base()
    other.get_parameter("1.bias").data.view(torch.int32)[-1] ^= 1
    before = flat(other)
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        assert Header.from_json(trajectory.header.to_json()) == trajectory.header
        with pytest.raises(ValueError, match=r"the frozen weights are not those of the run.*load the base model"):
            replay(other, trajectory)
        assert torch.equal(flat(other), before)
        old, steps = dataclasses.replace(trajectory.header, frozen=None), list(trajectory)
    assert b"frozen" not in old.to_json()
    with closing(Trajectory.create(tmp_path / "old", old)) as trajectory:
        for step in steps:
            trajectory.append(step)
    with closing(Trajectory.open(tmp_path / "old")) as trajectory:
        replay(other, trajectory)
    other.get_parameter("1.bias").data.view(torch.int32)[-1] ^= 1
    assert torch.equal(flat(other), weights[-1])


def test_the_wrong_shape_dtype_or_name_is_refused_by_name(tmp_path: Path):
    run(tmp_path / "t")
    wider, renamed = base(), nn.Sequential(*list(base())[:3])
    wider[3] = nn.Linear(40, 4)
    half = base()
    half[1].to(torch.bfloat16)
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        for model, message in (
            (wider, r"'3\.weight' as \(3, 40\) float32, this model has it as \(4, 40\) float32"),
            (half, r"'1\.weight' as \(24,\) float32, this model has it as \(24,\) bfloat16"),
            (renamed, r"tunes parameter '3\.weight', which this model does not have"),
        ):
            before = flat(model.float())
            if model is half:
                half[1].to(torch.bfloat16)
            with pytest.raises(ValueError, match=message):
                replay(model, trajectory)
            assert torch.equal(flat(model.float()), before)


def test_an_unknown_sampler_is_refused_by_name(tmp_path: Path):
    class Cauchy(Gaussian):
        pass

    run(tmp_path / "t", sampler=Cauchy())
    with (
        closing(Trajectory.open(tmp_path / "t")) as trajectory,
        pytest.raises(ValueError, match="'Cauchy' is unknown; known are Gaussian, Rademacher"),
    ):
        replay(base(), trajectory)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_file_is_never_overwritten(tmp_path: Path):
    optimizer, _ = run(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    with pytest.raises(FileExistsError):
        Trajectory.create(tmp_path / "t", Header.of(optimizer.space))
    assert (tmp_path / "t").read_bytes() == content


def test_a_folder_stands_for_its_trajectory(tmp_path: Path):
    run(tmp_path / "trajectory.bin")
    with closing(Trajectory.open(tmp_path)) as trajectory:
        assert len(trajectory) == 12
    with pytest.raises(FileNotFoundError, match=r"there is no trajectory .*elsewhere"):
        Trajectory.open(tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no trajectory .*trajectory\.bin"):
        Trajectory.open(tmp_path / "empty")


def test_truncate_and_append_continue_a_run(tmp_path: Path):
    run(tmp_path / "t")
    content = (tmp_path / "t").read_bytes()
    with closing(Trajectory.open(tmp_path / "t", append=True)) as trajectory:
        steps = list(trajectory)
        trajectory.truncate(5)
        assert list(trajectory) == steps[:5]
        for step in steps[5:]:
            trajectory.append(step)
        with pytest.raises(ValueError, match="has 12 steps, but the checkpoint was written after step 13"):
            trajectory.truncate(13)
    assert (tmp_path / "t").read_bytes() == content


@pytest.mark.slow
def test_a_record_is_in_the_systems_hands_when_append_returns(tmp_path: Path):
    """The process ends without any chance to flush."""
    script = f"""
import os, torch
from mezo_lightning.optimizer import MeZO
from mezo_lightning.steps import GradientEstimate
from mezo_lightning.trajectory import Header, Trajectory
mezo = MeZO([torch.nn.Parameter(torch.zeros(3))])
mezo.trajectory = Trajectory.create({str(tmp_path / "t")!r}, Header.of(mezo.space))
for step in range(7):
    mezo.step(estimate=GradientEstimate((step,), (1.0,)))
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=120).returncode == 9
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        assert len(trajectory) == 7


def offsets_of(path: Path) -> list[int]:
    with closing(Trajectory.open(path)) as trajectory:
        return list(trajectory._offsets)


@pytest.mark.parametrize("zeros", [0, 1, 9, 500])
def test_a_torn_last_record_is_dropped_with_a_warning_wherever_it_was_cut(tmp_path: Path, zeros: int):
    """With zeros after it too, where the file system had reserved the space and not written to it."""
    path, cut = tmp_path / "t", tmp_path / "cut"
    run(path, queries=2)
    content, offsets = path.read_bytes(), offsets_of(path)
    for end in range(offsets[-3], offsets[-1]):
        cut.write_bytes(content[:end] + bytes(zeros))
        whole = 12 - (1 if end >= offsets[-2] else 2)
        if end in offsets and not zeros:
            with closing(Trajectory.open(cut)) as trajectory:
                assert len(trajectory) == whole
            continue
        if (content[:end] + bytes(zeros)).startswith(content[: offsets[whole + 1]]):
            continue  # zeros in place of zeros are no damage
        with pytest.warns(UserWarning, match=f"the record of step {whole} was cut short and is dropped"):
            trajectory = Trajectory.open(cut)
        with closing(trajectory):
            assert len(trajectory) == whole
        assert cut.stat().st_size == end + zeros  # reading changes nothing
        with pytest.warns(UserWarning, match="cut short"):
            trajectory = Trajectory.open(cut, append=True)
        with closing(trajectory):
            trajectory.append(Step())
        with closing(Trajectory.open(cut)) as trajectory:
            assert len(trajectory) == whole + 1


def test_every_flipped_byte_is_seen(tmp_path: Path):
    path, flipped = tmp_path / "t", tmp_path / "flipped"
    run(path, steps=6, queries=2)
    content, offsets = path.read_bytes(), offsets_of(path)
    for at in range(len(content)):
        for bit in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[at] ^= bit
            flipped.write_bytes(damaged)
            record = sum(offset <= at for offset in offsets) - 1
            if record < 0:
                with pytest.raises(ValueError, match=r"not a trajectory|format version|header of .* is damaged"):
                    Trajectory.open(flipped)
            elif record < 5:
                with pytest.raises(ValueError, match=f"the record of step {record} is damaged"):
                    Trajectory.open(flipped)
            else:  # nobody can tell the last record's damage from a crash in the middle of it
                found = outcome(flipped)
                assert found == 5 or "the record of step 5 is damaged" in str(found)


def outcome(path: Path) -> int | str:
    """How many records there are, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trajectory = Trajectory.open(path)
        except ValueError as error:
            return str(error)
    with closing(trajectory):
        return len(trajectory)


def test_records_that_are_missing_or_swapped_are_seen(tmp_path: Path):
    path = tmp_path / "t"
    run(path)
    content, at = path.read_bytes(), offsets_of(path)
    path.write_bytes(content[: at[4]] + content[at[5] :])
    with pytest.raises(ValueError, match="the record of step 4 is damaged"):
        Trajectory.open(path)
    path.write_bytes(content[: at[4]] + content[at[5] : at[6]] + content[at[4] : at[5]] + content[at[6] :])
    with pytest.raises(ValueError, match="the record of step 4 is damaged"):
        Trajectory.open(path)


def test_a_cut_header_is_refused(tmp_path: Path):
    path, cut = tmp_path / "t", tmp_path / "cut"
    run(path, steps=1)
    header = path.read_bytes()[: offsets_of(path)[0]]
    for end in (0, 1, 7, 13, 14, 100, len(header) - 1):
        cut.write_bytes(header[:end])
        with pytest.raises(ValueError, match=r"is not a trajectory|header of .* is damaged"):
            Trajectory.open(cut)
    newer = struct.pack("<8sHI", b"MEZOTRAJ", 4, 0)
    cut.write_bytes(newer)
    with pytest.raises(ValueError, match="has format version 4; this program reads version 3"):
        Trajectory.open(cut)


def test_opening_a_long_log_is_linear(tmp_path: Path):
    """50,000 records: with a copy of the rest for each of them, 45 GB would pass through memory."""
    optimizer = MeZO([nn.Parameter(torch.zeros(3))])
    with closing(Trajectory.create(tmp_path / "t", Header.of(optimizer.space))) as trajectory:
        for number in range(50_000):
            trajectory.append(Step(((number, (0.5,)),), (0.0,)))
    with closing(Trajectory.open(tmp_path / "t")) as trajectory:
        assert len(trajectory) == 50_000
        assert trajectory[-1] == Step(((49_999, (0.5,)),), (0.0,))
    assert os.path.getsize(tmp_path / "t") < 50_000 * 32 + 1000
