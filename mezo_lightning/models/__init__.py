"""Pre-trained models: where they come from, what is put on top of them or in front, and where they go."""
