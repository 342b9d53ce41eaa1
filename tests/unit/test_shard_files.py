"""Pieces that ranks write come back as the whole, however they are cut; and a save happens, or it does not."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from mezo_lightning.processes.ranks import Alone
from mezo_lightning.sharding import shard_files
from mezo_lightning.sharding.shard_files import (
    ShardFiles,
    read_shards,
    remove,
    save_beside,
    weights_folder,
    write_shards,
)
from mezo_lightning.shards import Shard

SHAPES = {"matrix": (7, 13), "vector": (5,), "scalar": (), "cube": (3, 4, 5), "empty": (0, 4), "one": (1, 1)}
BESIDE = {"none": None, "byte": torch.int8, "fp32": torch.float32, "moments": torch.float32}


def make_whole(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def make_beside(whole: dict[str, Tensor], dtype: torch.dtype | None, moments: bool = False) -> dict[str, Tensor]:
    """A number for each weight, or two of them."""
    if dtype is None:
        return {}
    flat = {name: (tensor.float().view(-1) * 50).to(dtype) for name, tensor in whole.items()}
    return {name: torch.stack([tensor, -tensor], dim=1) for name, tensor in flat.items()} if moments else flat


def cut(whole: Tensor, bounds: list[float], rank: int) -> Shard:
    """The piece of one rank, between two of the bounds, which are shares of the whole."""
    numel = whole.numel()
    marks = [0, *(round(bound * numel) for bound in bounds), numel]
    return Shard(whole.view(-1)[marks[rank] : marks[rank + 1]].clone(), whole.shape, marks[rank], False)


def cut_beside(beside: Tensor, bounds: list[float], rank: int) -> Tensor:
    """What lies beside the piece of one rank."""
    marks = [0, *(round(bound * len(beside)) for bound in bounds), len(beside)]
    return beside[marks[rank] : marks[rank + 1]].clone()


def write(folder: Path, whole: dict[str, Tensor], beside: dict[str, Tensor], bounds: list[float]) -> None:
    """Write the files of all ranks; one has nothing beside what it has nothing of, as an optimizer does."""
    world_size = len(bounds) + 1
    for rank in range(world_size):
        pieces = {name: cut(tensor, bounds, rank) for name, tensor in whole.items()}
        near = {name: cut_beside(tensor, bounds, rank) for name, tensor in beside.items() if pieces[name].numel()}
        write_shards(folder, rank, world_size, pieces, near)


@pytest.mark.parametrize("kept", BESIDE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_piece_reads_back_whatever_cut_it(tmp_path_factory, kept: str, dtype: torch.dtype, data: st.DataObject):
    bounds = sorted(data.draw(st.lists(st.floats(0, 1), max_size=4)))
    folder = tmp_path_factory.mktemp("weights")
    whole = make_whole(dtype)
    beside = make_beside(whole, BESIDE[kept], kept == "moments")
    write(folder, whole, beside, bounds)
    files = ShardFiles(folder)
    assert files.shapes == {name: tensor.shape for name, tensor in whole.items()}
    assert files.beside == {name for name in beside if beside[name].numel()}
    for name, tensor in whole.items():
        end = data.draw(st.integers(0, tensor.numel()))
        begin = data.draw(st.integers(0, end))
        assert files.dtype(name) == dtype
        piece = files.read(name, begin, end)
        assert piece.dtype == dtype
        assert torch.equal(piece, tensor.view(-1)[begin:end])
        if name in files.beside:
            assert torch.equal(files.read_beside(name, begin, end), beside[name][begin:end])


@pytest.mark.parametrize("kept", BESIDE)
@pytest.mark.parametrize("chunk", [1, 8, 1 << 24])
def test_another_number_of_ranks_takes_up_its_pieces(tmp_path: Path, monkeypatch, kept: str, chunk: int):
    monkeypatch.setattr(shard_files, "_CHUNK", chunk)
    whole = make_whole(torch.bfloat16)
    beside = make_beside(whole, BESIDE[kept], kept == "moments")
    write(tmp_path, whole, beside, [0.3, 0.4])
    for bounds in ([], [0.5], [0.1, 0.2, 0.9]):
        for rank in range(len(bounds) + 1):
            pieces = {name: cut(torch.zeros_like(tensor), bounds, rank) for name, tensor in whole.items()}
            near = {
                name: cut_beside(torch.zeros_like(tensor), bounds, rank)
                for name, tensor in beside.items()
                if pieces[name].numel()
            }
            read_shards(ShardFiles(tmp_path), pieces, near)
            for name, piece in pieces.items():
                assert torch.equal(piece.data, cut(whole[name], bounds, rank).data)
                if name in near:
                    assert torch.equal(near[name], cut_beside(beside[name], bounds, rank))


def test_whole_weights_are_filled_too(tmp_path: Path):
    whole = make_whole(torch.float16)
    write(tmp_path, whole, {}, [0.5])
    filled = {name: torch.nn.Parameter(torch.zeros_like(tensor)) for name, tensor in whole.items()}
    read_shards(ShardFiles(tmp_path), filled, {})
    assert all(torch.equal(filled[name], whole[name]) for name in whole)


def test_what_was_read_is_no_window_on_the_file(tmp_path: Path):
    whole = make_whole(torch.float32)
    write(tmp_path, whole, {}, [])
    files = ShardFiles(tmp_path)
    with torch.device("meta"):  # a default device is not heeded
        files.read("matrix", 0, 91).zero_()
    assert torch.equal(files.read("matrix", 0, 91), whole["matrix"].view(-1))


# -- folders that cannot be read ---------------------------------------------------------------------------------------


def without_a_rank(folder: Path) -> None:
    (folder / "rank-00001-of-00002.safetensors").unlink()


def without_any(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def of_two_jobs(folder: Path) -> None:
    write(folder, make_whole(torch.float32), {}, [])


def cut_short(folder: Path) -> None:
    path = folder / "rank-00000-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def of_someone_else(folder: Path) -> None:
    save_file({"x": torch.zeros(3)}, folder / "rank-00000-of-00002.safetensors")


def with_a_gap(folder: Path) -> None:
    write_shards(folder, 1, 2, {"matrix": cut(make_whole(torch.float32)["matrix"], [0.5, 0.6], 2)}, {})


def with_an_end_missing(folder: Path) -> None:
    write_shards(folder, 1, 2, {"matrix": cut(make_whole(torch.float32)["matrix"], [0.5, 0.6], 1)}, {})


def with_an_overlap(folder: Path) -> None:
    write_shards(folder, 1, 2, {"matrix": cut(make_whole(torch.float32)["matrix"], [0.4], 1)}, {})


def of_another_shape(folder: Path) -> None:
    write_shards(folder, 1, 2, {"matrix": cut(torch.zeros(13, 7), [0.5], 1)}, {})


@pytest.mark.parametrize(("spoil", "error", "message"), [
    (without_a_rank, FileNotFoundError, "lacks rank-00001-of-00002.safetensors: not all ranks wrote"),
    (without_any, FileNotFoundError, "holds no weights"),
    (of_two_jobs, ValueError, "holds files of jobs of 1 and of 2 ranks"),
    (cut_short, ValueError, "rank-00000-of-00002.safetensors is damaged"),
    (of_someone_else, ValueError, "rank-00000-of-00002.safetensors is damaged"),
    (with_a_gap, ValueError, "lacks elements 46 to 55 of 'matrix'"),
    (with_an_end_missing, ValueError, "lacks elements 55 to 91 of 'matrix'"),
    (with_an_overlap, ValueError, "holds twice elements 36 to 46 of 'matrix'"),
    (of_another_shape, ValueError, r"has 'matrix' as \[13, 7\], another rank's as \[7, 13\]"),
])  # fmt: skip
def test_what_is_not_whole_is_refused(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[Exception], message: str
):
    write(tmp_path, {"matrix": make_whole(torch.float32)["matrix"]}, {}, [0.5])
    ShardFiles(tmp_path)
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        ShardFiles(tmp_path)


def test_a_half_of_what_rounding_keeps_is_refused(tmp_path: Path):
    whole = make_whole(torch.bfloat16, {"matrix": (7, 13)})
    write(tmp_path, whole, make_beside(whole, torch.int8), [0.5])
    write_shards(tmp_path, 1, 2, {"matrix": cut(whole["matrix"], [0.5], 1)}, {})
    with pytest.raises(ValueError, match="lacks elements 46 to 91 of 'beside/matrix'"):
        ShardFiles(tmp_path)


@pytest.mark.parametrize(("model", "beside", "message"), [
    ({"a": (3, 4), "b": (2,)}, [], r"does not have the weight 'b'"),
    ({}, [], r"has a weight 'a', which this model does not have"),
    ({"a": (4, 3)}, [], r"has 'a' as \(3, 4\) float32, this model as \(4, 3\) float32"),
    ({"a": (3, 4)}, ["a"], r"nothing beside the weight 'a': it was tuned with another rounding"),
])  # fmt: skip
def test_a_model_that_does_not_fit_is_left_alone(
    tmp_path: Path, model: dict[str, tuple[int, ...]], beside: list[str], message: str
):
    write(tmp_path, make_whole(torch.float32, {"a": (3, 4)}), {}, [])
    pieces = {name: torch.zeros(shape) for name, shape in model.items()}
    with pytest.raises(ValueError, match=message):
        read_shards(ShardFiles(tmp_path), pieces, {name: torch.zeros(12) for name in beside})
    assert not any(tensor.any() for tensor in pieces.values())


def test_another_dtype_does_not_fit(tmp_path: Path):
    write(tmp_path, make_whole(torch.float32, {"a": (3,)}), {}, [])
    with pytest.raises(ValueError, match=r"as \(3,\) float32, this model as \(3,\) bfloat16"):
        read_shards(ShardFiles(tmp_path), {"a": torch.zeros(3, dtype=torch.bfloat16)}, {})


# -- saves -------------------------------------------------------------------------------------------------------------


def save(path: Path, value: int, size: int = 100) -> None:
    """A checkpoint of which everything says the same number."""
    piece = Shard(torch.full((size,), float(value)), (size,), 0)

    def write_small(where: Path, folder: str) -> None:
        buffer = io.BytesIO()
        torch.save({"value": value, "weights": folder, "ballast": torch.zeros(1000)}, buffer)
        for half in (buffer.getvalue()[:2000], buffer.getvalue()[2000:]):
            with where.open("ab") as file:
                file.write(half)

    save_beside(path, value, Alone(), {"w": piece}, {"w": torch.full((size,), value, dtype=torch.int8)}, write_small)


def value_of(path: Path) -> int:
    """The number, which has to be the same everywhere."""
    small = torch.load(path)
    files = ShardFiles(weights_folder(path, small["weights"]))
    size = files.shapes["w"].numel()
    assert files.read("w", 0, size).eq(small["value"]).all()
    assert files.read_beside("w", 0, size).eq(small["value"]).all()
    return small["value"]


def folders(path: Path) -> list[str]:
    return sorted(folder.name for folder in (path.parent / "weights").iterdir())


def test_a_save_replaces_the_one_before_and_leaves_others_alone(tmp_path: Path):
    last, other = tmp_path / "run" / "last.ckpt", tmp_path / "run" / "last.ckpt-1.ckpt"
    for value in (1, 2):
        save(last, value)
        save(other, 10 + value)
    assert (value_of(last), value_of(other)) == (2, 12)
    assert [name[:-8] for name in folders(last)] == ["last.ckpt-1.ckpt-12-", "last.ckpt-2-"]
    remove(last)
    assert not last.exists()
    assert len(folders(other)) == 1
    assert value_of(other) == 12
    remove(other)
    assert not any((tmp_path / "run").iterdir())
    remove(other)  # Lightning may ask twice


def test_lightning_finds_no_checkpoints_that_are_none(tmp_path: Path):
    """It takes all digits after hpc_ckpt_ in any file's name, the last one counts, and .ckpt for a checkpoint."""
    save(tmp_path / "hpc_ckpt_1.ckpt", 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hpc_ckpt_1.ckpt", "weights"]


def test_a_link_to_a_checkpoint_leads_to_its_weights(tmp_path: Path):
    save(tmp_path / "run" / "step-3.ckpt", 3)
    (tmp_path / "run" / "last.ckpt").symlink_to("step-3.ckpt")
    (tmp_path / "elsewhere.ckpt").symlink_to(tmp_path / "run" / "last.ckpt")
    assert value_of(tmp_path / "run" / "last.ckpt") == 3
    assert value_of(tmp_path / "elsewhere.ckpt") == 3
    remove(tmp_path / "run" / "last.ckpt")
    assert value_of(tmp_path / "run" / "step-3.ckpt") == 3


def test_weights_that_were_left_behind_are_named(tmp_path: Path):
    save(tmp_path / "run" / "last.ckpt", 3)
    (tmp_path / "run" / "last.ckpt").rename(tmp_path / "last.ckpt")
    with pytest.raises(FileNotFoundError, match=r"last.ckpt has its weights in .*/weights/last.ckpt-3-.* not there"):
        value_of(tmp_path / "last.ckpt")


def test_no_bucket(tmp_path: Path):
    with pytest.raises(ValueError, match=r"s3://bucket/last\.ckpt is on no local disk"):
        save_beside("s3://bucket/last.ckpt", 1, Alone(), {}, {}, lambda *_: None)


def test_a_small_file_that_cannot_be_written_leaves_the_checkpoint_before(tmp_path: Path):
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def fail(where: Path, folder: str) -> None:
        where.write_bytes(b"torn")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        save_beside(path, 2, Alone(), {"w": Shard(torch.zeros(4), (4,), 0)}, {}, fail)
    assert value_of(path) == 1
    assert len(folders(path)) == 1


# Forks of one process, for it takes two seconds to import torch.
SPOILED = """
import os, random, resource, shutil, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from test_shard_files import folders, save, value_of

torch.set_num_threads(1)  # a fork has none of the threads that its parent's pool still waits for
SIZE = 5_000_000
LIMITS = [100, 10_000, SIZE, 5 * SIZE - 1]

def forked(action):
    pid = os.fork()
    if pid:
        return pid
    try:
        action()
    except Exception as error:
        print(type(error).__name__, flush=True)
        os._exit(3)
    os._exit(0)

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_at(number):
    seen = 0
    def count():
        nonlocal seen
        seen += 1
        if seen == number:
            os.kill(os.getpid(), signal.SIGKILL)
    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith("mezo_lightning/sharding/shard_files.py"):
            return None
        count()
        return trace
    sys.addaudithook(lambda event, arguments: count() if event.split(".")[0] in ("open", "os", "shutil") else None)
    sys.settrace(trace)
    save(path, 2)

def save_on(first):
    for value in range(first, 100):
        save(path, value, SIZE)

def fill_disk(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(path, 2, SIZE)

path = Path(sys.argv[1]) / "last.ckpt"
found = []
number, code = 0, 0
save(path, 1)
while code != 0 or not number:  # at every line of the program, and at every single thing that it does to files
    number += 1
    code = ended(forked(lambda: kill_at(number)))
    found.append(value_of(path))
    assert code in (0, -9), code
assert found == sorted(found), found
assert found.count(1) > 50 and found.count(2) > 10, found
save(path, 3)
assert len(folders(path)) == 1, folders(path)  # of the last save; what the killed ones left is gone

value = 1
for _ in range(5):  # at any moment
    save(path, value, SIZE)
    pid = forked(lambda: save_on(value + 1))
    time.sleep(random.uniform(0.02, 0.3))
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -9
    assert value_of(path) >= value
    value = value_of(path)

save(path, 1, SIZE)
for limit in LIMITS:
    assert ended(forked(lambda: fill_disk(limit))) == 3, limit
    assert value_of(path) == 1
    assert len(folders(path)) == 1, folders(path)
print("done", number)
"""


@pytest.mark.slow
def test_kills_and_full_disks_leave_a_checkpoint(tmp_path: Path):
    words = [sys.executable, "-c", SPOILED, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("done")
    assert done.stdout.splitlines()[:-1] == ["OSError"] * 4
