"""Load a checkpoint straight into pieces: no process ever holds more of the model than its share.

The model is built without weights. Then, one parameter after another, memory is reserved for the whole of it but not
touched, so that the system does not provide it; it is cut up, and this rank's piece filled from just the rows of the
files that it covers. Each rank does this on its own. Only the modules that an adapter copies (``modules_to_save``) are
put together on the way, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoConfig, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation

from mezo_lightning.models.adapters import adapter_config
from mezo_lightning.models.kinds import auto_class_of
from mezo_lightning.models.pretrained import Pretrained, check_dtype
from mezo_lightning.sharding.pretrained_files import PretrainedFiles, base_folder
from mezo_lightning.sharding.weight_files import WeightFiles
from mezo_lightning.shards import Shard

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM
    from mezo_lightning.sharding.zero3 import Sharded

_CHUNK = 1 << 20  # elements that are read at once
_STARTS = {
    "peft_type": ("ADALORA", "BOFT", "FOURIERFT", "HIRA", "HRA", "IA3", "LOKR", "LORA", "OFT", "RANDLORA", "VERA"),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "use_dora": (False,),
    "trainable_token_indices": (None,),
}
"""Adapters that start from the shapes of weights and a seed; others have been seen to start wrong, without an error."""


def load_sharded(pretrained: Pretrained, dtype: torch.dtype, placement: Sharded) -> CausalLM:
    """The model that ``pretrained.load`` gives, cut up over all ranks.

    Takes the memory of this rank's share, and little more.

    Args:
        pretrained: What to load.
        dtype: float32, bfloat16 or float16.
        placement: Cuts parameters up.

    Raises:
        ValueError: If the weights cannot be read piece by piece, or the adapter needs whole ones to start from.
        FileNotFoundError: If files are missing.
    """
    folder = base_folder(pretrained)
    if pretrained.adapter is not None:
        _check_adapter(pretrained.adapter)
    with torch.device("cpu"):  # Lightning's default is that of the run; it moves buffers later
        model = empty_model(pretrained, dtype, folder)
        # An adapter may put modules together, for which all ranks have to be there.
        placement.ranks.together(lambda: _read(model, PretrainedFiles(folder, model), placement))
        adapted = _adapt(pretrained, model)
        placement.partition(adapted.parameters())
    return adapted


def _check_adapter(adapter: dict[str, Any]) -> None:
    """Refuse an adapter that may be made from the values of the weights it comes upon."""
    options = adapter_config(adapter).to_dict() | adapter
    wrong = [name for name, starts in _STARTS.items() if name in options and options[name] not in starts]
    if wrong:
        raise ValueError(
            f"adapter: {wrong[0]}: {options[wrong[0]]} may need whole weights to start from, and no process has them; "
            "use LORA with init_lora_weights: true, or --trainer.strategy replicated"
        )


def empty_model(pretrained: Pretrained, dtype: torch.dtype, folder: Path) -> PreTrainedModel:
    """The model in eval mode without its weights: parameters on the device "meta", buffers as it computes them.

    Args:
        pretrained: What to load.
        dtype: float32, bfloat16 or float16.
        folder: Where its files are.

    Raises:
        ValueError: If the weights are quantised, or the model wants others of another dtype among them.
    """
    check_dtype(dtype)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=pretrained.trust_remote_code)
    if pretrained.quantization is not None or config.to_dict().get("quantization_config") is not None:
        raise ValueError(
            f"name={pretrained.name!r} has quantised weights, which cannot be read piece by piece. Use one with dense "
            "weights, or --trainer.strategy replicated"
        )
    with _parameters_on_meta():
        opened_by = auto_class_of(pretrained.kind, pretrained.name, config)
        model = opened_by.from_config(config, dtype=dtype, trust_remote_code=pretrained.trust_remote_code)
    model.name_or_path = config.name_or_path = pretrained.locate()[0]
    model.generation_config = _generation_config(folder)
    kept = _kept_in_fp32(model, dtype)
    pretrained.check_dense({torch.float32 if name in kept else p.dtype for name, p in model.named_parameters()}, dtype)
    for name, buffer in list(model.named_buffers()):
        if name in kept:
            _put(model, name, buffer.to(torch.float32))
    return model.eval()


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # older models have its values in config.json
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that are made in this context have no memory for their parameters; buffers are real.

    A parameter that a module registers again is the same one as before, so that it stays tied.
    """
    stand_ins = WeakIdKeyDictionary()

    def replace(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta:
            return parameter
        if parameter not in stand_ins:
            stand_ins[parameter] = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        return stand_ins[parameter]

    handle = register_module_parameter_registration_hook(replace)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()


def _kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> set[str]:
    """The names of weights that transformers would keep in fp32."""
    plan = model._get_dtype_plan(dtype)
    if not plan:
        return set()
    pattern = build_glob_alternation(list(plan))[0]
    return {name for name in model.state_dict() if pattern.search(name)}


def _read(model: PreTrainedModel, files: WeightFiles, placement: Sharded) -> None:
    for name, buffer in model.named_buffers():
        if name in files.shapes:
            buffer.copy_(files.read(name, 0, buffer.numel()).view(buffer.shape))
    for names, parameter in _parameters(model):
        whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
        piece = nn.Parameter(whole, parameter.requires_grad)
        placement.partition([piece])
        _fill(placement.shard(piece), files, names[0])
        for name in names:
            _put(model, name, piece)


def _parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """The parameters of a model, once each, with all names that each goes by."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return [(some, parameter) for parameter, some in names.items()]


def _fill(piece: Shard, files: WeightFiles, name: str) -> None:
    for begin in range(0, piece.numel(), _CHUNK):
        part = piece.data[begin : begin + _CHUNK]
        part.copy_(files.read(name, piece.begin + begin, piece.begin + begin + part.numel()))


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, tensor)


def _adapt(pretrained: Pretrained, model: PreTrainedModel) -> CausalLM:
    """Put the adapter on top of a model whose weights are cut up."""
    base = set(model.parameters())
    adapted = pretrained.adapt(model)
    for name, parameter in adapted.named_parameters():
        assert parameter in base or parameter.numel() > 0, name
    return adapted
