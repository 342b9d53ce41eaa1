"""Replays and exports that stream give the files that the whole model would, in the memory of one of them."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from helpers import assert_same, mezo, weights
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from mezo_lightning import Pretrained, Trajectory, replay
from mezo_lightning.commands import rebuild
from mezo_lightning.commands.rebuild import export_checkpoint, replay_run
from mezo_lightning.models.pretrained import export
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.samplers import Gaussian, Rademacher
from mezo_lightning.sharding import streaming
from mezo_lightning.sharding.placement import Whole
from mezo_lightning.sharding.shard_files import write_shards
from mezo_lightning.shards import Shard
from mezo_lightning.steps import Step, round_coefficient, round_fp32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COMBINATIONS: Any = [
    ("fp32", "stochastic"),
    *((name, rounding) for name in ("bf16", "fp16") for rounding in ("stochastic", "compensated", "master")),
]
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj", "v_proj"]}


def step(number: int) -> Step:
    """A step of two directions, with decay in one of two groups."""
    terms = ((100 + number, (1e-2, -2e-3)), (200 + number, (0.0, 3e-3)))
    rounded = tuple((seed, tuple(map(round_coefficient, coefficients))) for seed, coefficients in terms)
    return Step(rounded, (round_fp32(0.01), 0.0), number)


def make_run(folder: Path, pretrained: Pretrained, dtype: torch.dtype, rounding: Any = "stochastic") -> Path:
    """The trajectory of three steps, the second of which was skipped."""
    model = pretrained.load(dtype)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    sampler = Rademacher() if rounding == "master" else Gaussian()
    space = ParameterSpace.of(named, [number % 2 for number in range(len(named))], sampler, rounding)
    folder.mkdir()
    header = Whole().header(model, space, dataclasses.asdict(pretrained))
    with Trajectory.create(folder / "trajectory.bin", header) as log:
        for made in (step(0), Step(number=1), step(2)):
            log.append(made)
    return folder


def replay_whole(run: Path, pretrained: Pretrained, dtype: torch.dtype, folder: Path, stop: int | None = None) -> Path:
    """What a replay has to give, by way of the whole model."""
    model = pretrained.load(dtype)
    with Trajectory.open(run) as log:
        replay(model, log, stop=stop)
    return export(model, pretrained.load_tokenizer(), folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path) -> dict[str, Tensor]:
    return weights(AutoModelForCausalLM.from_pretrained(folder))


def rewrite(folder: Path, new: Path, change: Callable[[dict[str, Tensor]], list[dict[str, Tensor]]]) -> Path:
    """A copy of a model's folder, its weights changed and put into files of our own."""
    new.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (new / path.name).write_bytes(path.read_bytes())
    parts = change(load_file(folder / "model.safetensors"))
    names = ["model.safetensors"] if len(parts) == 1 else [f"part-{number}.safetensors" for number in range(len(parts))]
    for name, part in zip(names, parts, strict=True):
        save_file(part, new / name, {"format": "pt"})
    if len(parts) > 1:
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (new / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return new


@pytest.fixture
def never_whole(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called, a model that is loaded whole fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the whole model was loaded")

    return lambda: monkeypatch.setattr(Pretrained, "load", refuse)


# -- replay ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("precision", "rounding"), COMBINATIONS)
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
def test_a_replay_gives_the_files_of_the_whole_model(
    kind: str, precision: str, rounding: Any, tmp_path: Path, folders: dict[str, Path], never_whole: Any, monkeypatch
):
    monkeypatch.setattr(rebuild, "_PIECE", 1000)
    pretrained, dtype = Pretrained(str(folders[kind])), DTYPES[precision]
    run = make_run(tmp_path / "run", pretrained, dtype, rounding)
    whole = replay_whole(run, pretrained, dtype, tmp_path / "whole")
    base = replay_whole(run, pretrained, dtype, tmp_path / "base", stop=0)
    never_whole()
    replay_run(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    assert contents(tmp_path / "out")["model.safetensors"] != contents(base)["model.safetensors"]
    replay_run(run, tmp_path / "none", steps=0)
    assert contents(tmp_path / "none") == contents(base)


def test_many_files_hold_the_same(tmp_path: Path, opt: Path, monkeypatch: pytest.MonkeyPatch):
    pretrained = Pretrained(str(opt))
    run = make_run(tmp_path / "run", pretrained, torch.float32)
    whole = replay_whole(run, pretrained, torch.float32, tmp_path / "whole")
    monkeypatch.setattr(streaming, "MAX_FILE_BYTES", 20_000)
    replay_run(run, tmp_path / "out")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    largest = load_file(whole / "model.safetensors")["model.decoder.embed_tokens.weight"].nbytes
    assert all(path.stat().st_size < max(largest, 20_000) + 3000 for path in files)
    assert_same(loaded(tmp_path / "out"), loaded(whole))
    # Hugging Face's own way of writing so many files.
    OPTForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "theirs", max_shard_size=20_000)
    assert {**contents(tmp_path / "theirs"), **contents(tmp_path / "out")} == contents(tmp_path / "out")


def cut_up(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    names = sorted(weights)
    return [{name: weights[name] for name in names[first::3]} for first in range(3)]


def without_prefix(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name.removeprefix("model."): weight for name, weight in weights.items()}]


def with_both_tied(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{**weights, "lm_head.weight": weights["model.decoder.embed_tokens.weight"].clone()}]


def with_the_other_tied(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{"lm_head.weight": weights.pop("model.decoder.embed_tokens.weight"), **weights}]


def in_half(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{name: weight.half() for name, weight in weights.items()}]


@pytest.mark.parametrize("change", [cut_up, without_prefix, with_both_tied, with_the_other_tied, in_half])
def test_bases_are_stored_in_many_ways(change: Any, tmp_path: Path, opt: Path, never_whole: Any):
    pretrained = Pretrained(str(rewrite(opt, tmp_path / "base", change)))
    run = make_run(tmp_path / "run", pretrained, torch.bfloat16)
    whole = replay_whole(run, pretrained, torch.bfloat16, tmp_path / "whole")
    never_whole()
    replay_run(run, tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), loaded(whole))
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (tmp_path / "out", whole)]
    assert sizes[0] == pytest.approx(sizes[1], abs=500)  # nothing is there twice


def test_frozen_weights_come_as_they_were(tmp_path: Path, opt: Path, never_whole: Any):
    pretrained = Pretrained(str(opt), trainable="fc1|bias")
    run = make_run(tmp_path / "run", pretrained, torch.bfloat16)
    whole = replay_whole(run, pretrained, torch.bfloat16, tmp_path / "whole")
    never_whole()
    replay_run(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_what_ships_with_the_package_streams_too(tmp_path: Path, never_whole: Any):
    pretrained = Pretrained("embedded/opt-stories")
    run = make_run(tmp_path / "run", pretrained, torch.bfloat16)
    whole = replay_whole(run, pretrained, torch.bfloat16, tmp_path / "whole")
    never_whole()
    replay_run(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def with_another_bit(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    weights["model.decoder.embed_positions.weight"].view(-1).view(torch.int32)[-1] ^= 1
    return [weights]


@pytest.mark.parametrize(("arguments", "another", "message"), [
    ({}, "opt2", "starts from other weights than this model has"),
    # All that follows starts from the same tuned weights on the other base.
    ({"trainable": "bias"}, "opt2", "the frozen weights are not those of the run"),
    ({"trainable": "bias"}, "one bit", "the frozen weights are not those of the run"),
    ({"adapter": LORA}, "opt2", "the frozen weights are not those of the run"),
    ({"adapter": LORA}, "one bit", "the frozen weights are not those of the run"),
    ({"adapter": LORA, "quantization": NF4}, "opt2", "the frozen weights are not those of the run"),
])  # fmt: skip
def test_other_base_weights_are_refused_before_anything_is_written(
    arguments: Any, another: str, message: str, tmp_path: Path, folders: dict[str, Path]
):
    if "quantization" in arguments:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (the extra quantised)")
    base = tmp_path / "base"
    base.symlink_to(folders["opt"])
    run = make_run(tmp_path / "run", Pretrained(str(base), **arguments), torch.float32)
    base.unlink()
    if another == "one bit":
        rewrite(folders["opt"], base, with_another_bit)
    else:
        base.symlink_to(folders[another])
    with pytest.raises(ValueError, match=message):
        replay_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_failure_halfway_leaves_nothing(tmp_path: Path, opt: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "run", Pretrained(str(opt)), torch.float32)
    monkeypatch.setattr(streaming, "MAX_FILE_BYTES", 20_000)
    written = []

    def save(tensors: Any, path: Path, metadata: Any) -> None:
        if len(written) == 3:
            raise OSError("No space left on device")
        written.append(path)
        save_file(tensors, path, metadata)

    monkeypatch.setattr(streaming, "save_file", save)
    with pytest.raises(OSError, match="No space left"):
        replay_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def other_tied(weights: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    return [{**weights, "lm_head.weight": weights["model.decoder.embed_tokens.weight"] + 1}]


@pytest.mark.parametrize(("arguments", "change"), [
    ({"adapter": LORA}, lambda weights: [weights]),
    ({}, other_tied),  # which transformers does not tie, then
])  # fmt: skip
def test_what_cannot_be_streamed_is_loaded_whole(
    arguments: dict[str, Any], change: Any, tmp_path: Path, opt: Path, capsys: pytest.CaptureFixture[str]
):
    pretrained = Pretrained(str(rewrite(opt, tmp_path / "base", change)), **arguments)
    run = make_run(tmp_path / "run", pretrained, torch.float32)
    whole = replay_whole(run, pretrained, torch.float32, tmp_path / "whole")
    replay_run(run, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
    assert ("Loading all weights at once" in capsys.readouterr().err) == (not arguments)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Where").input_ids


# -- export ------------------------------------------------------------------------------------------------------------


def small_file(pretrained: Pretrained, dtype: torch.dtype, state: dict[str, Tensor], **mezo: Any) -> dict[str, Any]:
    return {
        "hyper_parameters": {"pretrained": dataclasses.asdict(pretrained)},
        "state_dict": {f"model.{name}": weight for name, weight in state.items()},
        "mezo": {"dtype": str(dtype).removeprefix("torch."), **mezo},
    }


def save_whole(path: Path, model: Any, pretrained: Pretrained, dtype: torch.dtype) -> Path:
    """A checkpoint of one process."""
    torch.save(small_file(pretrained, dtype, model.state_dict()), path)
    return path


def save_sharded(path: Path, model: Any, pretrained: Pretrained, dtype: torch.dtype) -> Path:
    """A checkpoint of three ranks that have cut every parameter up as DeepSpeed does."""
    for rank in range(3):
        pieces = {}
        for name, parameter in model.named_parameters():
            size = -(-parameter.numel() // 3)
            begin = min(rank * size, parameter.numel())
            pieces[name] = Shard(parameter.detach().view(-1)[begin : begin + size], parameter.shape, begin)
        beside = {name: torch.zeros(piece.shape, dtype=torch.int8) for name, piece in pieces.items() if piece.numel()}
        write_shards(path.parent / "weights" / "last.ckpt-7-01234567", rank, 3, pieces, beside)
    torch.save(small_file(pretrained, dtype, {}, weights="last.ckpt-7-01234567"), path)
    return path


def tuned_model(pretrained: Pretrained, dtype: torch.dtype) -> Any:
    model = pretrained.load(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    return model


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("kind", ["opt", "gpt2", "llama"])
@pytest.mark.parametrize("save", [save_whole, save_sharded])
def test_an_export_gives_the_files_of_the_whole_model(
    save: Any, kind: str, precision: str, tmp_path: Path, folders: dict[str, Path], never_whole: Any
):
    pretrained, dtype = Pretrained(str(folders[kind])), DTYPES[precision]
    model = tuned_model(pretrained, dtype)
    whole = export(model, pretrained.load_tokenizer(), tmp_path / "whole")
    checkpoint = save(tmp_path / "last.ckpt", model, pretrained, dtype)
    never_whole()
    export_checkpoint(checkpoint, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("save", [save_whole, save_sharded])
def test_many_files_are_exported(save: Any, tmp_path: Path, opt: Path, monkeypatch: pytest.MonkeyPatch):
    pretrained = Pretrained(str(opt))
    model = tuned_model(pretrained, torch.bfloat16)
    checkpoint = save(tmp_path / "last.ckpt", model, pretrained, torch.bfloat16)
    monkeypatch.setattr(streaming, "MAX_FILE_BYTES", 20_000)
    export_checkpoint(checkpoint, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert_same(loaded(tmp_path / "out"), weights(model))


@pytest.fixture(scope="module")
def buffered(tmp_path_factory: pytest.TempPathFactory, opt: Path) -> Path:
    """A model with a buffer that is saved, and fp32 whatever the parameters are."""
    sizes = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "vocab_size": 320}
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "first_k_dense_replace": 0, "q_lora_rank": 8}
    sizes |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes))
    model.get_buffer(BUFFER).copy_(torch.arange(4) / 7)
    folder = tmp_path_factory.mktemp("buffered")
    model.save_pretrained(folder, save_original_format=False)  # experts as they run, which can be streamed
    AutoTokenizer.from_pretrained(opt).save_pretrained(folder)
    return folder


BUFFER = "model.layers.0.mlp.gate.e_score_correction_bias"


def test_buffers_are_written_too(tmp_path: Path, buffered: Path, never_whole: Any):
    pretrained = Pretrained(str(buffered))
    run = make_run(tmp_path / "run", pretrained, torch.bfloat16)
    whole = replay_whole(run, pretrained, torch.bfloat16, tmp_path / "whole")
    model = tuned_model(pretrained, torch.bfloat16)
    checkpoint = save_sharded(tmp_path / "last.ckpt", model, pretrained, torch.bfloat16)
    never_whole()
    replay_run(run, tmp_path / "replayed")
    assert_same(loaded(tmp_path / "replayed"), loaded(whole))
    assert torch.equal(load_file(tmp_path / "replayed/model.safetensors")[BUFFER], torch.arange(4) / 7)
    export_checkpoint(checkpoint, tmp_path / "exported")  # which has no buffers
    assert_same(loaded(tmp_path / "exported"), weights(model))
    assert torch.equal(load_file(tmp_path / "exported/model.safetensors")[BUFFER], torch.arange(4) / 7)
    small = torch.load(checkpoint)
    torch.save({**small, "state_dict": {f"model.{BUFFER}": torch.arange(4) / 3}}, checkpoint)
    export_checkpoint(checkpoint, tmp_path / "other")
    assert torch.equal(load_file(tmp_path / "other/model.safetensors")[BUFFER], torch.arange(4) / 3)


@pytest.mark.parametrize("save", [save_whole, save_sharded])
def test_adapters_are_merged(save: Any, tmp_path: Path, opt: Path):
    pretrained = Pretrained(str(opt), adapter=LORA)
    model = tuned_model(pretrained, torch.float32)
    whole = export(model, pretrained.load_tokenizer(), tmp_path / "whole")
    export_checkpoint(save(tmp_path / "last.ckpt", model, pretrained, torch.float32), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("save", [save_whole, save_sharded])
@pytest.mark.parametrize(("kind", "message"), [
    ("gpt2", r"has the weight 'transformer.wte.weight' not at all, but .* has it with the shape \(320, 32\)"),
    ("narrow", r"'model.decoder.layers.0.fc1.weight' with the shape \(64, 32\), but .* with the shape \(48, 32\)"),
    ("shallow", r"has a weight 'model.decoder.layers.1\..*', which .* does not have"),
])  # fmt: skip
def test_weights_of_another_model_are_refused(
    save: Any, kind: str, message: str, tmp_path: Path, folders: dict[str, Path]
):
    model = tuned_model(Pretrained(str(folders["opt"])), torch.float32)
    other = folders["gpt2"]
    if kind != "gpt2":
        other = tmp_path / "other"
        size: dict[str, Any] = {"ffn_dim": 48} if kind == "narrow" else {"num_hidden_layers": 1}
        fields = {**json.loads((folders["opt"] / "config.json").read_text()), **size}
        OPTForCausalLM(OPTConfig(**fields)).save_pretrained(other)
        AutoTokenizer.from_pretrained(folders["opt"]).save_pretrained(other)
    checkpoint = save(tmp_path / "last.ckpt", model, Pretrained(str(other)), torch.float32)
    done = mezo("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert str(done.code).startswith("mezo: error: ")
    with pytest.raises(ValueError, match=message):
        export_checkpoint(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_there(tmp_path: Path, opt: Path):
    pretrained = Pretrained(str(opt))
    checkpoint = save_sharded(tmp_path / "last.ckpt", pretrained.load(), pretrained, torch.float32)
    (tmp_path / "weights/last.ckpt-7-01234567/rank-00002-of-00003.safetensors").unlink()
    done = mezo("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert "mezo: error: " in str(done.code)
    assert "lacks rank-00002-of-00003.safetensors" in str(done.code)
    checkpoint.write_bytes(b"no checkpoint")
    done = mezo("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert "last.ckpt' cannot be read: " in str(done.code)
    torch.save({"state_dict": {}}, checkpoint)
    done = mezo("export", "--checkpoint", checkpoint, "--output", tmp_path / "out")
    assert "last.ckpt' is not the checkpoint of a run of mezo" in str(done.code)
    assert not (tmp_path / "out").exists()


# -- a checkpoint of two ranks -----------------------------------------------------------------------------------------

SAVES = """
import resource, sys
from pathlib import Path
import torch
import torch.distributed as dist
from mezo_lightning.shards import Shard
from mezo_lightning.processes.ranks import Group
from mezo_lightning.sharding.shard_files import ShardFiles, save_beside, weights_folder

SIZE = 100_001
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
path = folder / "run" / "last.ckpt"
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
ranks = Group(rank, 2)

def save(value, small_fails=False):
    whole = torch.full((SIZE,), float(value))
    begin = rank * 50_001
    piece = Shard(whole[begin : begin + 50_001].clone(), (SIZE,), begin)

    def write_small(where, name):
        assert rank == 0
        if small_fails:
            raise OSError("the small file")
        torch.save({"value": value, "weights": name}, where)

    try:
        save_beside(path, value, ranks, {"w": piece}, {}, write_small)
    except Exception as error:
        print("told", type(error).__name__, str(error).split(str(folder))[-1], file=sys.stderr)
    dist.barrier()
    if rank == 0:
        small = torch.load(path)
        files = ShardFiles(weights_folder(path, small["weights"]))
        assert files.read("w", 0, SIZE).eq(small["value"]).all()
        print("told value", small["value"], "folders", len(list((path.parent / "weights").iterdir())), file=sys.stderr)
    dist.barrier()

save(1)
save(2)
for full in range(2):
    if rank == full:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    save(3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
save(4, small_fails=True)
save(5)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_an_error_on_one_rank_is_an_error_on_all_and_leaves_the_checkpoint(tmp_path: Path):
    (tmp_path / "saves.py").write_text(SAVES)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    with forks.cleared() as processes:
        for rank, log in enumerate(logs):
            words = ("saves.py", str(rank), str(tmp_path))
            processes.append(forks.start(forks.python, *words, folder=tmp_path, log=log))
        codes = [forks.ended(process) for process in processes]
    texts = [log.read_text() for log in logs]
    assert codes == [0, 0], texts
    full = "could not be written: Error while serializing: I/O error: File too large (os error 27)"
    names = ["rank-00000-of-00002.safetensors", "rank-00001-of-00002.safetensors"]
    told = [[line.removeprefix("told ") for line in text.splitlines() if line.startswith("told ")] for text in texts]
    zero, one = told
    assert [line for line in zero if line.startswith("value")] == [
        "value 1 folders 1", "value 2 folders 1", *["value 2 folders 1"] * 3, "value 5 folders 1",
    ]  # fmt: skip
    failures = [[line for line in lines if not line.startswith("value")] for lines in (zero, one)]
    for rank, found in enumerate(failures):
        assert len(found) == 3
        for culprit, line in enumerate(found[:2]):
            assert line.startswith("OSError" if culprit == rank else "RankError")
            assert line.endswith(f"{names[culprit]} {full}")
    assert failures[0][2] == "OSError the small file"
    assert failures[1][2] == "RankError rank 0 of 2 failed: OSError: the small file"


# -- memory ------------------------------------------------------------------------------------------------------------

FILE_BYTES = 25_000_000
MEASURE = """
import json, os, sys, threading, time
from pathlib import Path
from mezo_lightning.sharding import streaming
from mezo_lightning.commands.rebuild import export_checkpoint, replay_run

def anonymous():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon"))) * 1024

def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

def measure(case, command, warm, real, out):
    global peak
    command = {"replay": replay_run, "export": export_checkpoint}[command]
    command(Path(warm), Path(out) / "warm")  # imports what is imported late
    before = peak = anonymous()
    threading.Thread(target=watch, daemon=True).start()
    command(Path(real), Path(out) / "real")
    print(case, peak - before, flush=True)

streaming.MAX_FILE_BYTES = int(sys.argv[1])
for words in json.loads(sys.argv[2]):  # each in a process of its own, which has imported everything
    pid = os.fork()
    if pid == 0:
        measure(*words)
        os._exit(0)
    os.waitpid(pid, 0)
"""
CASES = ("replay-master", "export-whole", "export-sharded")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, opt: Path) -> Path:
    """An OPT of 177 MB in bf16, in nine files."""
    folder = tmp_path_factory.mktemp("large")
    fields = {"hidden_size": 1024, "word_embed_proj_dim": 1024, "ffn_dim": 4096, "num_hidden_layers": 7}
    config = OPTConfig(**{**json.loads((opt / "config.json").read_text()), **fields})
    with torch.device("meta"):
        model = OPTForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    for number, parameter in enumerate(model.parameters()):
        torch.nn.init.constant_(parameter, 1 + number)
    model.save_pretrained(folder, max_shard_size=FILE_BYTES)
    AutoTokenizer.from_pretrained(opt).save_pretrained(folder)
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == 9
    assert sum(sizes) > 170e6
    return folder


def written(folder: Path, model_folder: Path, case: str) -> Path:
    """What a command is to read: a run, or a checkpoint."""
    command, kind = case.split("-")
    pretrained = Pretrained(str(model_folder), trainable="fc1")  # a third of the weights, for the sake of time
    if command == "replay":
        return make_run(folder, pretrained, torch.bfloat16, kind)
    folder.mkdir()
    save = save_whole if kind == "whole" else save_sharded
    return save(folder / "last.ckpt", pretrained.load(torch.bfloat16), pretrained, torch.bfloat16)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, large: Path, opt: Path) -> dict[str, tuple[int, Path]]:
    """By how many bytes the memory of each command grew, and what it wrote."""
    outputs, words = {}, []
    for case in CASES:
        folder = tmp_path_factory.mktemp(case)
        inputs = [str(written(folder / name, base, case)) for name, base in (("warm", opt), ("real", large))]
        outputs[case] = folder / "out"
        words.append([case, case.split("-")[0], *inputs, str(outputs[case])])
    # The allocator keeps up to 32 MB of small blocks for later, however large the model is; it is not to.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(FILE_BYTES), json.dumps(words)],
        capture_output=True, text=True, timeout=500, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = dict(line.split() for line in done.stdout.splitlines() if line.startswith(CASES))
    assert found.keys() == set(CASES), done.stderr
    return {case: (int(found[case]), outputs[case]) for case in CASES}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_stays_that_of_one_file(case: str, measured: dict[str, tuple[int, Path]]):
    peak, out = measured[case]
    print(f"{case}: {peak / 1e6:.0f} MB for files of {FILE_BYTES / 1e6:.0f} MB")
    # A second file would be above it: a replay with master weights takes up to 25 MB of its own, buffers and all.
    assert peak < FILE_BYTES + 30e6
    files = list((out / "real").glob("*.safetensors"))
    assert len(files) == 9
    assert sum(path.stat().st_size for path in files) > 170e6
