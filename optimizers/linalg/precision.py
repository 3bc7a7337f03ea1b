"""Precision of matrix products, by what they need and by what a platform offers."""

from typing import Any, NamedTuple

from jax import lax

FULL = lax.Precision.HIGHEST
# Below these ridges, relative to the largest eigenvalue, rounding errors of three bfloat16 passes reach the root.
_STATISTICS, _SOLVER = 1e-5, 1e-4


class Precision(NamedTuple):
    """Precision of a bucket's products, in the words of `jax.lax.dot_general`.

    Attributes:
      statistics: of products of gradients, and of gradients with bases.
      solver: of the minimax iteration; others need full float32.
      action: of roots applied to a momentum, and of Newton-Schulz steps, which need about three digits.
    """

    statistics: Any = FULL
    solver: Any = FULL
    action: Any = FULL


def precision_of(kind: str, platform: str, ridge: float) -> Precision:
    """Return the precision for "auto" or "float32" on a JAX platform.

    Three bfloat16 passes have 16 bits. They are `Precision.HIGH` on TPUs; on GPUs that would be TF32, with 10 bits.
    CPUs have full precision only.
    """
    if kind == "float32" or platform not in ("tpu", "gpu", "cuda", "rocm"):
        return Precision()
    passes = lax.Precision.HIGH if platform == "tpu" else lax.DotAlgorithmPreset.BF16_BF16_F32_X3
    statistics, solver = (passes if ridge >= least else FULL for least in (_STATISTICS, _SOLVER))
    return Precision(statistics, solver, lax.Precision.DEFAULT)
