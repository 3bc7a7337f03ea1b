"""Saving, finding, verifying and restoring checkpoints; moving a state to another mesh or model."""
