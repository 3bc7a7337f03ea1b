"""Attention kernels for accelerators, products of groups of rows, and what kernels cost, for planning."""
