"""The knobs (`schema`), config files, overrides, and checks before a run."""
