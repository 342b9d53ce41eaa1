"""A direction for each row of a batch, in one forward of the whole batch."""
