"""``python -m mezo_lightning`` is the command ``mezo``."""

from mezo_lightning.cli import main

main()
