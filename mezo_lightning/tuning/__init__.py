"""``mezo tune``: which epsilon, learning rate, batch size and queries suit a model and its data."""
