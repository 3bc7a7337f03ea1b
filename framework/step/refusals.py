"""Turn ValueErrors that a user's task or optimizer raises while it is traced into one-line UserErrors."""

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
def of(component: Any = None) -> Iterator[None]:
    """Raise UserError for a ValueError of a `raise` statement in the component's package or in this package.

    Other ValueErrors, of JAX or of Python itself, are bugs and keep their traceback. Without a component, every
    ValueError is a refusal, such as those of an optimizer that is built.
    """
    filtering = jax.config.values[_FILTERING]
    # Otherwise JAX removes its own frames, and its errors look like the component's.
    jax.config.update(_FILTERING, "off")
    try:
        yield
    except ValueError as error:
        if component is None or _deliberate(error, {_OURS, type(component).__module__.partition(".")[0]}):
            raise UserError(str(error)) from error
        raise
    finally:
        jax.config.update(_FILTERING, filtering)


def _deliberate(error: ValueError, packages: set[str]) -> bool:
    frame, line = [*traceback.walk_tb(error.__traceback__)][-1]
    statement = linecache.getline(frame.f_code.co_filename, line).split(maxsplit=1)
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages and statement[:1] == ["raise"]
