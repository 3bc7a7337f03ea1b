"""Errors, durations, values, paths and JSON files. Imports nothing else of this package, nor JAX."""
