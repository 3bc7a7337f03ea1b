"""Run a first collective on all devices, so that a broken network shows before anything is compiled."""

import jax
import jax.numpy as jnp
import numpy as np


def all_reduce() -> None:
    """Count the devices of all processes with an all-reduce.

    Raises:
      RuntimeError: the count is wrong, or the collective fails because a process is gone.
    """
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("all",))
    one_each = jax.make_array_from_callback(
        devices.shape, jax.NamedSharding(mesh, jax.P("all")), lambda index: np.ones(1, np.float32)
    )
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))(one_each)
    if int(total) != devices.size:
        raise RuntimeError(f"the first all-reduce counted {int(total)} of {devices.size} devices")
