"""Manifests, and moving a state to other devices, models or options."""
