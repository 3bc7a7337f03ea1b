"""Momentum, diagonal methods, grafting, norms and weight decay."""
