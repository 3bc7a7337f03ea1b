"""Hugging Face folders of the decoders that `lm.LMTask` can be: config.json as knobs, tensors as parameters."""
