"""How parameters become matrices, blocks, buckets and tiles, and which device owns a block."""
