"""The head of a table of results: what it shows, and when, where and by which command it was taken."""

import platform
import sys
from datetime import date
from pathlib import Path

import torch


def print_heading(title: str, device: str = "cpu") -> None:
    """Print it, in Markdown.

    Args:
        title: What the table shows.
        device: A torch device; the machine's own where it is ``cuda``.
    """
    cpu = f"CPU ({platform.machine()}), {torch.get_num_threads()} threads"
    where = torch.cuda.get_device_name() if device == "cuda" else cpu
    command = " ".join([f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    print(f"# {title}\n")
    print(f"{date.today()}, {where}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"`python {command}`\n")
