"""Trace models without long compilation, and list all equations."""

import functools
import math

import jax
from jax.extend import core

# Programs are small and run once: they compile in a third of the time without LLVM's optimisations.
quick_jit = functools.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)


def equations(jaxpr, *, unrolled=False):
    """Return all equations, including those inside calls; `unrolled` repeats those of a scan for each iteration."""
    for eqn in jaxpr.eqns:
        yield eqn
        times = eqn.params["length"] if unrolled and eqn.primitive.name == "scan" else 1
        for parameter in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: isinstance(x, core.Jaxpr)):
            inner = parameter.jaxpr if isinstance(parameter, core.ClosedJaxpr) else parameter
            if isinstance(inner, core.Jaxpr):
                for _ in range(times):
                    yield from equations(inner, unrolled=unrolled)


def dot_flops(eqn):
    """Return the floating-point operations of a dot_general."""
    (contract, _), _ = eqn.params["dimension_numbers"]
    return 2 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contract)
