"""Roots computed by the CPU cores of the host while the devices train."""
