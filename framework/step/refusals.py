"""What a task or an optimizer refuses of a config when it is first traced: the user's to mend, in one line."""

import contextlib
import linecache
import traceback
from collections.abc import Iterator
from typing import Any

import jax

from ..base.errors import UserError

_FILTERING = "jax_traceback_filtering"
_OURS = __name__.partition(".")[0]


@contextlib.contextmanager
def of(component: Any) -> Iterator[None]:
    """A ValueError of a `raise` statement in the component's own package, or in this one, becomes a UserError.

    One that JAX raises beneath it, or Python itself, such as for a tuple that cannot be unpacked, is somebody's bug and
    keeps its traceback.
    """
    filtering = jax.config.values[_FILTERING]
    jax.config.update(_FILTERING, "off")  # otherwise JAX takes its own frames out, and its errors look like the task's
    try:
        yield
    except ValueError as error:
        if _meant(error, {_OURS, type(component).__module__.partition(".")[0]}):
            raise UserError(str(error)) from error
        raise
    finally:
        jax.config.update(_FILTERING, filtering)


def _meant(error: ValueError, packages: set[str]) -> bool:
    frame, line = [*traceback.walk_tb(error.__traceback__)][-1]
    statement = linecache.getline(frame.f_code.co_filename, line).split(maxsplit=1)
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages and statement[:1] == ["raise"]
