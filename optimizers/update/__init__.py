"""Momentum, norms and weight decay of updates."""
