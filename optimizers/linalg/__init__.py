"""Inverse roots of stacks of matrices, and packed symmetric matrices. Imports no other package of ours."""
