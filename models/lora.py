"""Low-rank adapters (LoRA, arXiv 2106.09685): a layer with a frozen kernel W computes x W + (alpha / rank) (x A) B.

They are added to the layers of Flax, `nn.Dense` and `nn.DenseGeneral`, of any module, which needs no change for it. The
parameters of the module become two collections: "params" has A and B, and "frozen" all others. Shapes in names: R rank.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.dtypes import promote_dtype
from flax.traverse_util import flatten_dict, unflatten_dict

from .modules import partitioned

A, B = "lora_a", "lora_b"  # names of the parameters beside a kernel
# As of `torch.nn.Linear`, which PEFT uses: uniform, with bounds 1 / sqrt(inputs). B begins at 0.
_A_INIT = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class Adapters:
    """The adapters of a module.

    Attributes:
      rank: columns of A and rows of B.
      alpha: their product is multiplied by alpha / rank.
      targets: names of the layers that have one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        """Factor of the product of A and B."""
        return self.alpha / self.rank

    def attached(self) -> contextlib.AbstractContextManager[None]:
        """Add the adapters to all modules that are called in this context, and to kernels that `matrix` returns."""
        return nn.intercept_methods(self._call)

    def _call(self, call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y, layer = call(*args, **kwargs), context.module
        dense = isinstance(layer, nn.Dense | nn.DenseGeneral) and context.method_name in ("__call__", "matrix")
        if not dense or layer.name not in self.targets:
            return y
        scope: Any = layer.scope
        if context.method_name == "matrix":
            a, b = promote_dtype(*(scope.get_variable("params", name) for name in (A, B)), dtype=layer.dtype)
            return y + self.scale * jnp.tensordot(a, b, 1)
        [x] = args
        boxed = scope.get_variable("params", "kernel")  # with the names of its axes in `init`, without them in `apply`
        kernel = nn.unbox(boxed)
        features = layer.features if isinstance(layer.features, tuple) else (layer.features,)
        inputs = kernel.ndim - len(features)
        names = boxed.names if isinstance(boxed, nn.LogicallyPartitioned) else (None,) * kernel.ndim

        def folded(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return _A_INIT(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)

        a = layer.param(A, partitioned(folded, *names[:inputs], None), (*kernel.shape[:inputs], self.rank), jnp.float32)
        zeros = partitioned(nn.initializers.zeros_init(), None, *names[inputs:])
        b = layer.param(B, zeros, (self.rank, *kernel.shape[inputs:]), jnp.float32)
        x, a, b = promote_dtype(x, a, b, dtype=layer.dtype)
        return y + self.scale * jnp.tensordot(jnp.tensordot(x, a, inputs), b, 1)

    def split(self, variables: dict[str, Any], dtype: Any, exact: Collection[str]) -> dict[str, Any]:
        """Return variables with the collections "params" and "frozen".

        Args:
          variables: of the module's `init`, with or without the names of axes.
          dtype: of the frozen parameters.
          exact: last names of those that stay float32.

        Raises:
          ValueError: no layer has the name of a target.
        """
        flat = flatten_dict(variables["params"])
        parts: dict[str, Any] = {"params": {}, "frozen": {}}
        for path, value in flat.items():
            parts["params" if path[-1] in (A, B) else "frozen"][path] = value
        adapted, layers = (sorted({path[-2] for path in x if path[-1] in (A, "kernel")}) for x in parts.values())
        if unknown := [name for name in self.targets if name not in adapted]:
            raise ValueError(f"task.lora_targets={unknown[0]}: no layer has this name. Use any of {', '.join(layers)}")

        def held(path: tuple[str, ...], value: Any) -> Any:
            return value if path[-1] in exact else jax.tree.map(lambda x: x.astype(dtype), value)

        parts["frozen"] = {path: held(path, value) for path, value in parts["frozen"].items()}
        return {**variables, **{name: unflatten_dict(part) for name, part in parts.items()}}

    def merged(self, kernel: np.ndarray, place: tuple[slice, ...], a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a part of a stack of kernels with the product of the adapters added, float32.

        Args:
          kernel: the part.
          place: its place in the stack [layers, ...].
          a: the whole A, [layers, inputs..., R].
          b: the whole B, [layers, R, outputs...].
        """
        inputs = a.ndim - 2
        a, b = a[place[: 1 + inputs]], b[(place[0], slice(None), *place[1 + inputs :])]
        product = a.reshape(len(a), -1, self.rank) @ b.reshape(len(b), self.rank, -1)
        return kernel.astype(np.float32) + self.scale * product.reshape(kernel.shape)


def joined(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return all parameters of a module, given "params" and, if there is one, "frozen"."""
    if "frozen" not in variables:
        return variables["params"]
    return unflatten_dict(flatten_dict(variables["frozen"]) | flatten_dict(variables["params"]))
