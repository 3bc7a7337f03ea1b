"""Print lines for the user."""

import jax

from ..base.errors import printable


def say(message: str) -> None:
    """Print a line on process 0; do nothing on the others."""
    if jax.process_index() == 0:
        try:
            print("\n".join(map(printable, message.split("\n"))), flush=True)
        except BrokenPipeError:
            raise
        except OSError:  # a log file on a full disk must not end a run; the line stays in Python's buffer
            pass
