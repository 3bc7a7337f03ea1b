import jax
import jax.numpy as jnp
import pytest

from shampax.framework.base.errors import UserError
from shampax.framework.step import refusals


class Task:
    """A task that fails in three ways."""

    def refuses(self, x):
        raise ValueError("rows of 3 tokens; use 4")

    def unpacks(self, x):
        one, two = x.shape
        return one + two

    def lets_jax_fail(self, x):
        return jnp.concatenate([]) + x


def traced(task, name):
    with refusals.of(task):
        return jax.eval_shape(jax.jit(getattr(task, name)), jnp.zeros(3))


def test_only_value_errors_of_the_task_are_user_errors(capsys):
    """Faults: a traceback for an error that the user can fix; a bug in a task, raised by Python or JAX, has no
    traceback."""
    filtering = jax.config.values["jax_traceback_filtering"]
    with pytest.raises(UserError, match="rows of 3 tokens; use 4"):
        traced(Task(), "refuses")
    for name in ("unpacks", "lets_jax_fail"):
        with pytest.raises(ValueError, match=r"unpack|at least one array") as raised:
            traced(Task(), name)
        assert not isinstance(raised.value, UserError)
    assert jax.config.values["jax_traceback_filtering"] == filtering
