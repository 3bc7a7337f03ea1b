"""Flax models, each with its task (loss, metrics, decoding) beside it; they see no mesh but the one in the context."""
