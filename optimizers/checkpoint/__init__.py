"""The manifest of blocks, and moving a state to other devices, models or options."""
