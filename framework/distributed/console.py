"""Print lines for the user."""

import jax


def say(message: str) -> None:
    """Print a line on process 0; do nothing on the others."""
    if jax.process_index() == 0:
        print(message, flush=True)
