"""Rewards that anyone wrote: how one is found, recognised, called and remembered, and what may be believed of it."""
