"""Building blocks that Transformers share: parameters with named axes, norms, and stacks of equal layers."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .attention import Earlier, KeysValues, Pattern, attend_with_cache, attention
from .rotary import Rotation, rotate

EMBEDDING_STD = 0.02
# Values of a block that a policy can keep, as `checkpoint_name` calls them: queries, keys and values after rotation;
# attention's mean of the values; its product with the output kernel; the products of the MLP or of experts with their
# first kernels; the tokens of the experts of a device; where they are normed, queries and keys, or their latents,
# before that, and the output of the MLP or the experts.
KEPT = ("qkv", "context", "attention_out", "gate", "up", "routed", "qk", "latents", "mlp_out")
GATES = {"silu": nn.silu, "gelu": nn.gelu}  # activations of gates; GELU in its tanh form
QK_NORMS = ("", "head", "all")
_HOST = "host:"  # before a name: keep the value in the host's memory
_names = jax.checkpoint_policies.save_only_these_names
_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
REMAT_POLICIES = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    # Keeps products with weights, but not those of attention: they have batch dimensions and grow with T^2.
    "dots": _dots,
    # Attention's kernels are no products to JAX, so what they return has a name.
    "minimal": jax.checkpoint_policies.save_from_both_policies(_dots, _names("context")),
    "best": _names(*KEPT),
}


def is_remat(remat: str) -> bool:
    """Return whether `remat` is one of `REMAT_POLICIES`, or names of `KEPT`, with or without `host:`, and blanks."""
    names = [name.removeprefix(_HOST) for name in remat.split()]
    return remat in REMAT_POLICIES or (bool(names) and set(names) <= {*KEPT} and len(set(names)) == len(names))


def _policy(remat: str) -> Any:
    if remat in REMAT_POLICIES:
        return REMAT_POLICIES[remat]
    hosted = [name.removeprefix(_HOST) for name in remat.split() if name.startswith(_HOST)]
    kept = [name for name in remat.split() if not name.startswith(_HOST)]
    if not hosted:
        return _names(*kept)
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=kept,
        names_which_can_be_offloaded=hosted,
        offload_src="device",
        offload_dst="pinned_host",
    )


def partitioned(initializer: nn.initializers.Initializer, *names: str | None) -> nn.initializers.Initializer:
    """Return an initializer of a parameter whose axes have these names."""
    return nn.with_logical_partitioning(initializer, names)


def fan_in(scale: float, *names: str | None, stacked: int = 0) -> nn.initializers.Initializer:
    """Return a truncated normal of variance scale / fan_in, for kernels that dense layers fold to [inputs, outputs].

    Args:
      scale: variance times fan_in.
      *names: names of the axes of the parameter.
      stacked: number of leading axes that stack kernels.
    """
    axes = tuple(range(stacked))
    return partitioned(nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", batch_axis=axes), *names)


def rms_norm(
    name: str | None, dtype: jnp.dtype, epsilon: float = 1e-6, axes: tuple[str, ...] = ("norm",)
) -> nn.RMSNorm:
    """Return an RMSNorm over the last axes, computed in float32, with results of the given type.

    Args:
      name: of the module.
      dtype: of the results.
      epsilon: added to the mean square.
      axes: names of the axes, those of the scale.
    """
    over = tuple(range(-len(axes), 0))
    scale_init = partitioned(nn.initializers.ones_init(), *axes)
    return nn.RMSNorm(epsilon, dtype, scale_init=scale_init, reduction_axes=over, feature_axes=over, name=name)


class Attention(nn.Module):
    """Multi-head attention with rotary positions; kernels [E, H, D], [E, K, D] twice, and [H, D, E].

    `writers` is the number of parts of all layers that write into the residual stream: the variance of the last kernel
    is divided by it.

    `bias` adds biases [H, D] and [K, D] to queries, keys and values. `qk_norm` norms queries and keys before rotation:
    "head" each head, with scales [D]; "all" all heads together, with scales [H, D] and [K, D]. `sinks` are [H], or None
    without `has_sinks`; see `attention.attend`.
    """

    heads: int
    kv_heads: int
    head_dim: int
    embed_dim: int
    writers: int
    dtype: jnp.dtype
    bias: bool = False
    qk_norm: str = ""  # one of `QK_NORMS`
    epsilon: float = 1e-6  # of the norms
    has_sinks: bool = False

    def setup(self):
        """Declare the kernels."""

        def into(heads: str, count: int) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                (count, self.head_dim),
                use_bias=self.bias,
                dtype=self.dtype,
                kernel_init=fan_in(1.0, "embed", heads, "kv"),
                bias_init=partitioned(nn.initializers.zeros_init(), heads, "kv"),
            )

        def norm(heads: str) -> Any:
            axes = (heads, "kv") if self.qk_norm == "all" else ("norm",)
            return rms_norm(None, self.dtype, self.epsilon, axes) if self.qk_norm else None

        self.query, self.query_norm = into("heads", self.heads), norm("heads")
        self.key, self.key_norm = into("kv_heads", self.kv_heads), norm("kv_heads")
        self.value = into("kv_heads", self.kv_heads)
        zeros = partitioned(nn.initializers.zeros_init(), "heads")
        self.sinks = self.param("sinks", zeros, (self.heads,)) if self.has_sinks else None
        out_init = fan_in(1 / self.writers, "heads", "kv", "embed")
        self.out = nn.DenseGeneral(
            self.embed_dim, axis=(-2, -1), use_bias=False, dtype=self.dtype, kernel_init=out_init
        )

    def queries(self, x_BxTxE: jax.Array, rotation: Rotation) -> jax.Array:
        """Return the rotated queries, [B, T, H, D]."""
        return rotate(_normed(self.query(x_BxTxE), self.query_norm), rotation)

    def keys_values(self, x_BxSxE: jax.Array, rotation: Rotation) -> KeysValues:
        """Return rotated keys, and values, [B, S, K, D] each."""
        return rotate(_normed(self.key(x_BxSxE), self.key_norm), rotation), self.value(x_BxSxE)

    def __call__(
        self,
        x_BxTxE: jax.Array,
        keys_values: KeysValues,
        segments: tuple[jax.Array, jax.Array],
        rotation: Rotation,
        *,
        causal: bool = False,
        kernel: str = "xla",
    ) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]; `segments` are those of the queries and of the keys."""
        query, pattern = self.queries(x_BxTxE, rotation), Pattern(causal)
        return self.project(attention(query, *keys_values, *segments, pattern, kernel=kernel))

    def kept(self, x_BxSxE: jax.Array, rotation: Rotation) -> KeysValues:
        """Return what a cache keeps of each token: `keys_values`."""
        return self.keys_values(x_BxSxE, rotation)

    def attend(
        self,
        query: jax.Array,
        kept: KeysValues,
        segments: jax.Array,
        pattern: Pattern,
        earlier: Earlier | None = None,
        cached: KeysValues | None = None,
        **run: Any,
    ) -> jax.Array:
        """Return the means of values, [B, T, H, D], for causal rows in the order of `layout.zigzag`.

        With a cache, whose slots are the earlier ones of these rows, the rows are in natural order.

        Args:
          query: of `queries`.
          kept: of the same tokens.
          segments: int32 [B, T].
          pattern: keys of its segment that a query sees.
          earlier: the slots of the cache.
          cached: what the cache has kept of their tokens.
          **run: `block` and `kernel` of `attention`, for rows without a cache.
        """
        if earlier is None or cached is None:
            return attention(query, *kept, segments, pattern=pattern, sinks=self.sinks, zigzag=True, **run)
        return attend_with_cache(query, kept, cached, segments, earlier, pattern, self.sinks)

    def project(self, mixed_BxTxHxD: jax.Array) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]."""
        return checkpoint_name(self.out(mixed_BxTxHxD), "attention_out")


def _normed(heads: jax.Array, norm: nn.RMSNorm | None) -> jax.Array:
    return norm(checkpoint_name(heads, "qk")) if norm else heads


class MLP(nn.Module):
    """relu(x up) down, or with a gate f(x gate) * (x up) down, as in SwiGLU; kernels [E, M] and [M, E], no biases."""

    width: int
    gate: str  # activation of the gate, one of `GATES`; "" for no gate
    writers: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array) -> jax.Array:
        """Return the update of the residual stream, [B, T, E]."""
        dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
        into = functools.partial(dense, self.width, kernel_init=fan_in(1.0, "embed", "mlp"))
        up_BxTxM = checkpoint_name(into(name="up")(x_BxTxE), "up")
        if self.gate:
            hidden_BxTxM = GATES[self.gate](checkpoint_name(into(name="gate")(x_BxTxE), "gate")) * up_BxTxM
        else:
            hidden_BxTxM = nn.relu(up_BxTxM)
        down_init = fan_in(1 / self.writers, "mlp", "embed")
        return dense(x_BxTxE.shape[-1], kernel_init=down_init, name="down")(hidden_BxTxM)


def run_layers(
    block: type[nn.Module],
    fields: tuple[Any, ...],
    x: jax.Array,
    *context: Any,
    layers: int,
    remat: str,
    name: str = "layers",
    per_layer: tuple[Any, ...] = (),
) -> tuple[jax.Array, Any]:
    """Apply `layers` blocks with their own parameters to `x`; call it in a module's compact method.

    The block is traced once. Its parameters are stacked along an axis named "layers".

    Args:
      block: class of the blocks; `block(*fields)(x, *inputs)` returns the next x and a tree of arrays or None.
      fields: arguments of the constructor.
      x: input of the first block.
      context: further inputs of every block.
      layers: number of blocks.
      remat: as in `is_remat`.
      name: of the stack among the parameters.
      per_layer: last inputs of the blocks, trees of arrays with a leading dimension for the layers.

    Returns:
      The last x, and the trees of all blocks, stacked.
    """
    in_axes = (nn.broadcast,) * len(context) + (0,) * len(per_layer)
    stack = scan_layers(lambda block, x, *inputs: block(x, *inputs), layers, in_axes)
    return stack(recomputed(block, remat)(*fields, name=name), x, *context, *per_layer)


def run_pattern(
    parent: nn.Module,
    block: type[nn.Module],
    fields: tuple[Any, ...],
    x: jax.Array,
    *context: Any,
    kinds: Sequence[str],
    layers: int,
    remat: str,
    name: str = "layers",
    per_layer: tuple[Any, ...] = (),
) -> tuple[jax.Array, Any]:
    """Apply blocks of several kinds as `run_layers` does those of one, with the same stack of parameters.

    A loop goes over the repetitions of the pattern, so that each block of the pattern is traced once, and once more if
    it is one of the layers that follow the last whole pattern.

    Args:
      parent: module in whose compact method this is called.
      block: class of the blocks, whose parameters do not depend on the kind.
      fields: first arguments of the constructor; the last one is the kind.
      x: input of the first block.
      context: further inputs of every block.
      kinds: kinds of the first layers, repeated over all of them.
      layers: as in `run_layers`.
      remat: as in `run_layers`.
      name: as in `run_layers`.
      per_layer: as in `run_layers`.

    Returns:
      The last x, and the trees of all blocks, stacked in the order of the layers.
    """
    if len(set(kinds[:layers])) == 1 or parent.is_initializing():
        fields = (*fields, kinds[0])
        return run_layers(block, fields, x, *context, layers=layers, remat=remat, name=name, per_layer=per_layer)
    stacked = parent.variables["params"][name], per_layer
    whole, rest = divmod(layers, len(kinds))
    outputs = []
    for first, turns, here in ((0, whole, kinds), (layers - rest, 1, kinds[:rest])):
        if turns and here:
            # XLA unrolls a loop of one turn, and would then merge the recomputation away.
            build = recomputed(block, remat, in_loop=turns > 1)
            blocks = [build(*fields, kind, parent=None) for kind in here]
            shape = turns, len(here)

            def cut(array: jax.Array, first: int = first, shape: tuple[int, int] = shape) -> jax.Array:
                return array[first : first + math.prod(shape)].reshape(*shape, *array.shape[1:])

            x, found = lax.scan(functools.partial(_turn, blocks, context), x, jax.tree.map(cut, stacked))
            outputs.append(jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), found))
    return x, jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *outputs)


def _turn(blocks: Sequence[nn.Module], context: tuple[Any, ...], x: jax.Array, stacked: Any) -> tuple[jax.Array, Any]:
    outputs = []
    for number, block in enumerate(blocks):
        params, inputs = jax.tree.map(lambda array, number=number: array[number], stacked)
        result: Any = block.apply({"params": params}, x, *context, *inputs)
        x, out = result
        outputs.append(out)
    return x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *outputs)


def recomputed(block: type[nn.Module], remat: str, *, in_loop: bool = True) -> Any:
    """Return the class of a block, recomputed in the backward pass as `remat` says.

    Inside a loop, such as that of `scan_layers`, the loop itself keeps XLA from merging the recomputation away.
    """
    return block if remat == "none" else nn.remat(block, policy=_policy(remat), prevent_cse=not in_loop)


def scan_layers(body: Any, length: int, in_axes: Any = nn.broadcast, state: tuple[str, ...] = ()) -> Any:
    """Return `body(block, carry, *inputs) -> (carry, outputs)` scanned over layers, with parameters stacked.

    Args:
      body: body of the loop.
      length: number of layers.
      in_axes: axes of the inputs, as of `nn.scan`; by default every layer gets the same inputs.
      state: stacked collections other than "params".
    """
    return nn.scan(
        body,
        variable_axes=dict.fromkeys(("params", *state), 0),  # pyright: ignore[reportArgumentType]
        split_rngs={"params": True, "dropout": True},
        in_axes=in_axes,
        length=length,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
