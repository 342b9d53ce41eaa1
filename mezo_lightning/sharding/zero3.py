"""DeepSpeed ZeRO-3 without an optimizer: every rank holds a piece of each parameter, and nothing else.

There are no gradients and no optimizer state to shard, so all that is used of DeepSpeed is how it cuts parameters up
and puts them together again. Perturbing and updating act on the pieces. How weights are put together to compute with:

=========  ==========================================================================================================
gather     what a probe does
=========  ==========================================================================================================
``layer``  DeepSpeed's hooks put each layer together just while it runs. Least memory, but every forward gathers the
           model once, and every token of a completion is a forward.
``whole``  The whole model is put together: once for all probes of a round where one layer at a time can be perturbed
           (``LeafScratch``), once a probe for generation.
``auto``   ``whole`` where every rank has memory for it when the model has been loaded, else ``layer``.
=========  ==========================================================================================================
"""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from mezo_lightning.evaluators import Copy, Evaluator
from mezo_lightning.fingerprints import fingerprint_of, named_weights
from mezo_lightning.leaf_scratch import LeafScratch
from mezo_lightning.parameters import ParameterSpace
from mezo_lightning.processes.ranks import Group, Lockstep, Ranks
from mezo_lightning.sharding.placement import Placement
from mezo_lightning.shards import Shard
from mezo_lightning.steps import Point

if TYPE_CHECKING:
    from mezo_lightning.models.pretrained import CausalLM, Pretrained

log = logging.getLogger(__name__)

Gather = Literal["auto", "layer", "whole"]
_SPARE = 0.8  # of the free memory, a gathered model may fill so much


def _start_deepspeed() -> None:
    """Let DeepSpeed use the process group that there is."""
    import deepspeed

    # On CPUs it would compile a kernel for reductions that are not used here: a minute, a compiler to be had, and a
    # lock on which every later job waits for ever once one is killed meanwhile.
    kernels: dict[str, bool] = deepspeed.ops.__compatible_ops__
    before = kernels.copy()
    kernels["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_init_required=False)
    finally:
        kernels.update(before)


class Sharded(Placement):
    """The weights of a model, cut up over all ranks.

    Args:
        rank: This process.
        world_size: How many there are.
        device: Of this process.
        gather: How weights are put together, see above.
    """

    def __init__(self, rank: int, world_size: int, device: torch.device, gather: Gather):
        _start_deepspeed()
        self.ranks: Ranks = Group(rank, world_size)
        self.gather: Gather = gather
        self._device = device
        self._prepared: nn.Module | None = None

    def load(self, pretrained: Pretrained, dtype: torch.dtype) -> CausalLM:
        from mezo_lightning.sharding.loading import load_sharded

        model = load_sharded(pretrained, dtype, self)
        self._prepare(model)
        return model

    def adopt(self, model: CausalLM) -> None:
        if self._prepared is not model:  # Lightning calls this at the beginning of every fit and validation
            self.partition(model.parameters())
            self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        self._prepared = model
        if self.gather == "auto":
            self.gather = self._affordable(model)
        if self.gather == "layer":
            self.ranks = Lockstep(self.ranks.rank, self.ranks.world_size, model)
            _install_hooks(model)

    def _affordable(self, model: nn.Module) -> Literal["layer", "whole"]:
        parameters: Any = list(model.parameters())
        size = sum(p.ds_numel * p.element_size() for p in parameters)
        free = min(self.ranks.gather(lambda: _free_memory(self._device)))
        choice = "whole" if size < _SPARE * free else "layer"
        if self.ranks.rank == 0:
            log.warning(
                "gather: auto chose %r: the model takes %.2f GB when put together, and %.2f GB are free on the fullest "
                "rank",
                *(choice, size / 1e9, free / 1e9),
            )
        return choice

    def partition(self, parameters: Iterable[nn.Parameter]) -> None:
        """Cut whole parameters up: each rank keeps its piece of each; those that are cut up already are left alone."""
        from deepspeed.runtime.zero.partition_parameters import Init, is_zero_param

        os.environ.setdefault("LOCAL_RANK", "0")
        # DeepSpeed's own way in would broadcast every parameter from rank zero first.
        zero: Any = Init(config_dict_or_path=_config(), mem_efficient_linear=False)
        for parameter in parameters:
            if not is_zero_param(parameter):
                whole: Any = parameter
                whole.data = whole.data.to(self._device)
                zero._convert_to_deepspeed_param(whole)
                whole.partition()

    def shard(self, parameter: Tensor) -> Shard:
        """This rank's piece of a parameter that was partitioned."""
        partitioned: Any = parameter
        size = partitioned.ds_tensor.numel()  # pieces are equal; the last ones end in padding, or are nothing but that
        begin = min(self.ranks.rank * size, partitioned.ds_numel)
        end = min(begin + size, partitioned.ds_numel)
        piece = partitioned.ds_tensor.data[: end - begin]
        return Shard(piece, partitioned.ds_shape, begin, parameter.requires_grad)  # pyright: ignore[reportCallIssue]

    def named_parameters(self, model: nn.Module) -> list[tuple[str, Tensor]]:
        return [(name, self.shard(parameter)) for name, parameter in model.named_parameters()]

    def named_weights(self, model: nn.Module) -> dict[str, Tensor]:
        pieces = dict(self.named_parameters(model))
        # Every rank has all of the buffers, and they are to count once.
        return {**named_weights(model), **pieces} if self.ranks.rank == 0 else pieces

    def fingerprint(self, space: ParameterSpace) -> int:
        return sum(self.ranks.gather(space.fingerprint)) % (1 << 64)

    def frozen_fingerprint(self, model: nn.Module, space: ParameterSpace) -> int:
        mine = self.named_weights(model)
        return sum(self.ranks.gather(lambda: fingerprint_of(mine.items(), without=space.parameters))) % (1 << 64)

    def present(self, model: nn.Module) -> AbstractContextManager[object]:
        return nullcontext() if self.gather == "layer" else _gathered(model)

    def evaluator(
        self, model: nn.Module, space: ParameterSpace, *, copies: bool, min_valid_fraction: float
    ) -> Evaluator:
        if self.gather == "layer":
            return Copy(space, min_valid_fraction=min_valid_fraction)
        kind = GatherEachPoint if copies else GatherOnce
        return kind(model, space, min_valid_fraction=min_valid_fraction)


class GatherEachPoint(Copy):
    """Each rank moves its pieces to the point; then the whole model is put together. For generation.

    Args:
        model: The model.
        space: Its pieces on this rank.
        min_valid_fraction: See ``Evaluator``.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        self._model = model

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        with closing(super().visit(points)) as visits:
            for point in visits:
                with _gathered(self._model):
                    yield point


class GatherOnce(Evaluator):
    """The whole model is put together once a round, and perturbed one leaf module at a time. For loss objectives.

    Args:
        model: The model.
        space: Its pieces on this rank.
        min_valid_fraction: See ``Evaluator``.
    """

    def __init__(self, model: nn.Module, space: ParameterSpace, *, min_valid_fraction: float = 0.5):
        super().__init__(space, min_valid_fraction=min_valid_fraction)
        self._model = model
        whole = dict(model.named_parameters())
        with torch.inference_mode(), _gathered(model):
            named = [(info.name, whole[info.name]) for info in space.table]
            dense = ParameterSpace.of(named, [0] * len(named), space.sampler, "stochastic")
            dense.step_number = space.step_number
            self._inner = LeafScratch(model, dense, min_valid_fraction=min_valid_fraction)

    def visit(self, points: Sequence[Point]) -> Generator[Point, None, None]:
        self._inner.space.sampler = self.space.sampler  # a resumed run has it from its checkpoint, later than this
        with _gathered(self._model), closing(self._inner.visit(points)) as visits:
            yield from visits


def _install_hooks(model: nn.Module) -> None:
    """Let DeepSpeed put layers together just while they run."""
    import deepspeed

    deepspeed.initialize(model=model, config=_config(), model_parameters=[])  # pyright: ignore[reportArgumentType]


def _config() -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        # Nothing may stay gathered after its layer has run: pieces change between forwards.
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0},
    }


def _gathered(model: nn.Module) -> AbstractContextManager[object]:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(list(model.parameters()))


def _free_memory(device: torch.device) -> float:
    """Bytes that this process may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
