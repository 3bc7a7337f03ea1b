"""Inverse roots of stacks of matrices, and packed symmetric matrices. Imports nothing else of ours."""
