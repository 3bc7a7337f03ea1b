"""Lines for the person at the console."""

import jax


def say(message: str) -> None:
    """Print a line from process 0 and nothing from the others."""
    if jax.process_index() == 0:
        print(message, flush=True)
