"""The command line: one module per verb.

Its import sets the environment of JAX before any verb imports JAX.
"""

import os
import signal
import sys
from pathlib import Path

_MAIN = Path(__file__).resolve().parents[1] / "__main__.py"


def _interrupted(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# The command `shampax` and `python -m` with a module of this package import this first. An exception would not do while
# modules are imported: some libraries catch any exception there, and others crash.
_verb = sys.argv[0] == "-m" and any(word.startswith(f"{__name__}.") for word in sys.orig_argv)
_starts = _verb or Path(sys.argv[0]) == _MAIN or Path(sys.argv[0]).name == "shampax"
if _starts and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

from .environment import before_jax  # noqa: E402

before_jax()


def interruptible() -> None:
    """From now on, let Ctrl-C raise KeyboardInterrupt. A verb calls it when its modules are imported."""
    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
