"""What every process of a job needs, made once: the server that such processes are forks of (``forks.py``) imports it.

A fork that looked for garbage among all this would copy the memory that it is in: half a second's work, for nothing.
"""

import contextlib
import gc
import importlib

import torch

MODULES = ("deepspeed", "helpers", "mezo_lightning.cli", "peft", "pytest", "transformers.models.opt.modeling_opt")

gc.disable()
for name in MODULES:
    with contextlib.suppress(ImportError):  # of an extra that is not installed
        importlib.import_module(name)
importlib.import_module("mezo_lightning").Gaussian().fill(torch.empty(1), 0, 0)  # its table takes a while
gc.freeze()
gc.enable()
