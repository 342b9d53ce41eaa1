"""A run from Python: Lightning's Trainer, the embedded model and its stories, F1 as the reward, a few steps.

    python examples/trainer.py

What differs from training by gradients, and what is in the run folder: docs/lightning.md.
"""

import tempfile
from functools import partial

from lightning.pytorch import Trainer

from mezo_lightning import CentralDifference, Generate, MeZO, MeZOModule, Pretrained, PromptDataModule, RewardObjective
from mezo_lightning.callbacks import ReportWriter, RunRecorder


def main(steps: int = 10, rows: int = 50) -> str:
    """Tune, and return the run folder."""
    module = MeZOModule(
        Pretrained("embedded/opt-stories", trainable="bias|layer_norm"),
        RewardObjective("rewards.squad.f1", completer=Generate(max_new_tokens=12)),
        CentralDifference(epsilon=5e-2, num_queries=4),
        optimizer=partial(MeZO, lr=2e-2),
    )
    data = PromptDataModule(
        train="embedded/stories/train.jsonl",
        validation="embedded/stories/validation.jsonl",
        num_validation=rows,
        prompt="Story: {story}\nQuestion: {question}\nAnswer:",
        batch_size=16,
    )
    folder = tempfile.mkdtemp()  # of this run alone: its trajectory is never overwritten
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        devices=1,
        num_sanity_val_steps=-1,  # validates the base model on all rows before the first step
        val_check_interval=steps,
        callbacks=[RunRecorder(), ReportWriter()],  # the records and report.html, which `mezo fit` has by itself
    )
    trainer.fit(module, data)
    return folder


if __name__ == "__main__":
    main()
