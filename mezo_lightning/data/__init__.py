"""Rows of text: out of files, through a template, in an order that a run can take up anywhere."""

from mezo_lightning.data.data_module import PromptDataModule

__all__ = ["PromptDataModule"]
