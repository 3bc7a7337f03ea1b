"""The first thing that all devices of a run do together, so that what does not work is found out before compiling."""

import jax
import jax.numpy as jnp
import numpy as np


def all_reduce() -> None:
    """Count the devices of all processes by a sum over them, and wait for it.

    Raises:
      RuntimeError: the sum is not their number; or whatever a collective raises whose other end is gone.
    """
    devices = np.array(jax.devices())
    mesh = jax.sharding.Mesh(devices, ("all",))
    one_each = jax.make_array_from_callback(
        devices.shape, jax.NamedSharding(mesh, jax.P("all")), lambda index: np.ones(1, np.float32)
    )
    total = jax.jit(jnp.sum, out_shardings=jax.NamedSharding(mesh, jax.P()))(one_each)
    if int(total) != devices.size:
        raise RuntimeError(f"the first all-reduce over {devices.size} devices has counted {int(total)}")
