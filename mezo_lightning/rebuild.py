"""From a run to a model: replay its trajectory on the base weights, or export one of its checkpoints."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
from rich.console import Console

from mezo_lightning.models import Pretrained, export
from mezo_lightning.module import MeZOModule
from mezo_lightning.trajectory import Trajectory, replay


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
    with closing(Trajectory.open(trajectory)) as log:
        if steps is not None and not 0 <= steps <= len(log):
            raise ValueError(f"steps={steps}: {log.path} has {len(log)} steps")
        if not log.header.base:
            raise ValueError(
                f"{log.path} does not say where its base weights come from; use mezo_lightning.replay(model, ...)"
            )
        pretrained = Pretrained(**{**log.header.base, "trust_remote_code": trust_remote_code})
        model = pretrained.load(getattr(torch, log.header.dtypes[0]))
        space = replay(model, log, stop=steps)
        export(model, pretrained.load_tokenizer(), output)
        Console().print(
            f"Replayed {len(log) if steps is None else steps} of {len(log)} steps on {pretrained.name}: {output} "
            f"(fingerprint of the weights {space.fingerprint():016x})"
        )


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint's weights as a Hugging Face folder: safetensors and tokenizer, adapters merged.

    Args:
        checkpoint: A .ckpt file of a run.
        output: The folder to write; it must not exist yet, or be empty.
    """
    if not Path(checkpoint).is_file():
        raise FileNotFoundError(f"checkpoint={str(checkpoint)!r} is not a file")
    module = MeZOModule.load_from_checkpoint(checkpoint, map_location="cpu")
    assert module.model is not None
    assert module.tokenizer is not None
    export(module.model, module.tokenizer, output)  # pyright: ignore[reportArgumentType]
    Console().print(f"Exported {checkpoint}: {output}")
