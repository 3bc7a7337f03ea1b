"""Momentum, norms and weight decay of an update."""
