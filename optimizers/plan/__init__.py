"""The static plan: views, blocks, buckets and tiles of parameters, and the owners of blocks."""
