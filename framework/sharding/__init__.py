"""The mesh, the placement of parameters by rules, and the global batch."""
