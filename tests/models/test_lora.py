import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from lm_cases import SMALL, assert_close, batch_of, logits_of, spec_of, variables_of
from traced import dot_flops, equations, quick_jit

from shampax.models import lora

ADAPTED = dataclasses.replace(SMALL, lora_rank=3, lora_alpha=2.0)
PATTERN = {"layers": 3, "layer_pattern": ("local", "global"), "attention_window": 4, "remat": "full"}


def merged(task, variables):
    """Return the parameters of the model without adapters that computes the same."""
    trained = flatten_dict(variables["params"], sep="/")
    return unflatten_dict(
        {
            path: task.merged(path, tuple(map(slice, x.shape)), x, trained.__getitem__)
            for path, x in flatten_dict(variables["frozen"], sep="/").items()
        },
        sep="/",
    )


@pytest.mark.parametrize("options", [{}, PATTERN], ids=["plain", "pattern"])
def test_a_merged_model_computes_the_same(options):
    """Faults: an adapter is left out where layers differ; its scale or the order of axes is wrong."""
    task = dataclasses.replace(ADAPTED, **options)
    variables = variables_of(task)
    plain = dataclasses.replace(task, lora_rank=0)
    expected = logits_of(plain, {"params": merged(task, variables)}, batch_of())
    without = logits_of(plain, {"params": variables["frozen"]}, batch_of())
    assert np.abs(expected - without).max() > 0.5
    assert_close(logits_of(task, variables, batch_of()), expected, 1e-4)


def test_the_beginning():
    """Faults: a run does not start at its base; adapters have no names of axes, or the base has none."""
    variables = quick_jit(ADAPTED.init)(jax.random.key(0), spec_of(batch_of()))
    params = flatten_dict(variables["params"], sep="/")
    assert len(params) == 14
    for path, value in params.items():
        if path.endswith(lora.B):
            assert not value.any()
        else:
            bound = 1 / np.sqrt(np.prod(value.shape[1:-1]))
            assert 0.7 * bound < np.abs(value).max() <= bound
    axes = ADAPTED.logical_axes(variables)
    names = flatten_dict(axes["params"], sep="/")
    assert names["layers/attention/query/lora_a"] == ("layers", "embed", None)
    assert names["layers/attention/query/lora_b"] == ("layers", None, "heads", "kv")
    assert names["layers/attention/out/lora_a"] == ("layers", "heads", "kv", None)
    assert (
        axes["frozen"]
        == SMALL.logical_axes(jax.eval_shape(SMALL.init, jax.random.key(0), spec_of(batch_of())))["params"]
    )


def test_a_frozen_base_is_held_in_the_compute_dtype():
    """Fault: the base takes twice the memory, or norms are rounded."""
    half = dataclasses.replace(ADAPTED, compute_dtype="bfloat16")
    abstract = jax.eval_shape(half.init, jax.random.key(0), spec_of(batch_of()))
    dtypes = {path: x.dtype for path, x in flatten_dict(abstract["frozen"], sep="/").items()}
    single = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    assert single == {"final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"}
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(abstract["params"]))
    whole = variables_of(half)
    held = whole | {
        "frozen": jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), whole["frozen"], abstract["frozen"])
    }
    np.testing.assert_array_equal(logits_of(half, held, batch_of()), logits_of(half, whole, batch_of()))


def test_flops_match_the_traced_matmuls():
    """Faults: MFU counts gradients of frozen kernels; they are computed."""
    variables, batch = variables_of(ADAPTED), batch_of()

    def loss(params):
        return ADAPTED.loss(variables | {"params": params}, batch, key=jax.random.key(0), train=True)[0]

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss))(variables["params"]).jaxpr
    dots = (eqn for eqn in equations(jaxpr, unrolled=True) if eqn.primitive.name == "dot_general")
    assert ADAPTED.square_flops(spec_of(batch)) == sum(map(dot_flops, dots))


def test_an_unknown_target_is_refused():
    """Fault: a misspelt layer is trained without an adapter."""
    task = dataclasses.replace(SMALL, lora_rank=2, lora_targets=("query", "q_proj"))
    with pytest.raises(ValueError, match=r"task\.lora_targets=q_proj: no layer has this name\. Use any of down, gate"):
        jax.eval_shape(task.init, jax.random.key(0), spec_of(batch_of()))
