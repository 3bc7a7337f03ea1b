"""Compute roots on the host's CPU cores while the devices train."""
