"""Models cut up over processes: where the weights lie, and how they get from files into pieces and back."""
