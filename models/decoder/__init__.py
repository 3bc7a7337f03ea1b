"""The decoder-only Transformer of `lm.LMTask`: its options, its block, experts, and its cache."""
