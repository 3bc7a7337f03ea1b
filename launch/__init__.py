"""The command line: one module per verb.

Its import sets the environment of JAX before any verb imports JAX.
"""

import os
import signal
import sys


def _interrupted(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)


# `python -m shampax.launch.VERB` imports this package first. `flags.run` takes over when all modules are imported.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupted)

from .environment import before_jax  # noqa: E402

before_jax()
