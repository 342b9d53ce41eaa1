"""Reward functions to plug in by import path.

Each file stands alone and follows TRL's convention, ``reward(prompts, completions, **columns) -> list[float | None]``:
higher is better, None means "no opinion on this row". Nothing here imports the trainer, so a file can be copied out.
"""
