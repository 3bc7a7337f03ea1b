"""SOAP: Adam in the eigenbasis of Shampoo's statistics (arXiv 2409.11321)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..diagonal import correction
from ..linalg import blas, lapack, roots
from ..linalg.roots import RootResult
from .base import Blocks, Preconditioner, PreconditionerState, multiplied

# Largest entry of |Q' Q - I| of an accepted basis.
ORTHOGONALITY = 1e-3
# Eigenvalues up to this share of the largest are rounding errors in float32: these directions have no statistics.
NULL = 1e-6


class Soap(Preconditioner):
    """The direction Q_L [ (Q_L' M Q_R) / sqrt(V) ] Q_R', with Q the eigenvectors of the statistics of each side.

    V is the second moment of the rotated gradient, updated every step. A refresh with R = Q_old' Q_new replaces V by
    (R o R)' V along each side, which is the diagonal of R' diag(V) R. Before the first refresh Q is the identity, and
    SOAP is Adam.

    The first basis is from `eigh`. Later ones are from one step of orthogonal iteration: the Q of a QR decomposition of
    S Q_old (algorithm 4 of the paper), with columns sorted by decreasing q' S q, because QR orthogonalises each column
    against those before it. Rounding errors would decide the basis of directions without statistics, so that runs on
    different meshes drift apart. These directions are therefore spanned by projections of fixed random vectors.
    """

    name = "soap"
    label = "SOAP"
    grafts = False
    adapts = True
    warm = True
    p = 1  # no root is taken

    def uses_lapack(self, options: Any) -> bool:
        """Return True: `eigh` and QR both use LAPACK."""
        del options
        return True

    def act(
        self, m: jax.Array, g: jax.Array, state: PreconditionerState, age: jax.Array, blocks: Blocks
    ) -> tuple[jax.Array, jax.Array | None]:
        """Return Adam's direction computed in the eigenbasis, rotated back."""
        bucket, options = blocks.bucket, blocks.options
        assert state.second_moment is not None
        bases = [_or_identity(q.astype(m.dtype), state.refreshed > 0) for q in state.roots]
        into = [jnp.swapaxes(q, -2, -1) for q in bases]
        precision = bucket.precision.statistics
        g, m = (multiplied(x, into, bucket.sides, precision) for x in (g, m))
        old, new = (1.0, 1.0) if bucket.beta2 == 1 else (bucket.beta2, 1 - bucket.beta2)
        v = old * state.second_moment + new * g * g
        corrected = v / correction(bucket.beta2, age, v.ndim)
        return multiplied(m / (jnp.sqrt(corrected) + options.epsilon), bases, bucket.sides, precision), v

    def solve(self, stack: jax.Array, old: jax.Array | None, blocks: Blocks) -> RootResult:
        """Return bases, identity in the padding; a basis is accepted if it is orthonormal."""
        assert old is not None
        sizes = blocks.sizes
        r = stack.shape[-1]
        real = jnp.arange(r) < sizes[:, None]
        real = real[:, :, None] & real[:, None, :]
        identity = jnp.eye(r, dtype=stack.dtype)
        a = jnp.where(real & jnp.isfinite(stack), stack, 0)
        trace = jnp.trace(a, axis1=-2, axis2=-1)
        a = roots.symmetric(a / jnp.where(trace > 0, trace, 1)[:, None, None])
        # Padding with an eigenvalue below all others keeps its eigenvectors separate and last.
        a = jnp.where(real, a, -identity)
        found = jnp.max(jnp.abs(old), axis=(-2, -1)) > 0

        def eigenvectors(a: jax.Array, old: jax.Array) -> jax.Array:
            del old
            return jnp.linalg.eigh(a)[1][:, :, ::-1]

        def iterated(a: jax.Array, old: jax.Array) -> jax.Array:
            moved = roots.matmul(a, old)
            moved = _sorted_columns(moved, -jnp.sum(old * moved, axis=-2))
            q, triangle = jnp.linalg.qr(moved)
            # A column that depends on those before it leaves a rounding error, which must not displace later columns.
            left = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
            dependent = left <= NULL * left[:, :1]
            return jax.lax.cond(
                jnp.any(dependent),
                lambda x, _: jnp.linalg.qr(_sorted_columns(x, dependent))[0],
                lambda _, q: q,
                moved,
                q,
            )

        start = jnp.where(found[:, None, None], old, identity)
        with jax.named_scope("rarely"):  # for planning: eigenvectors are computed once
            q = jax.lax.cond(jnp.all(found | (trace <= 0)), iterated, eigenvectors, a, start)
        q = jnp.where(real, q, identity)
        values = jnp.einsum("nij,nik,nkj->nj", q, a, q, precision=jax.lax.Precision.HIGHEST)
        values = jnp.where(jnp.arange(r) < sizes[:, None], values, 0)
        largest = jnp.max(values, axis=-1)
        null = (values <= NULL * largest[:, None]) & (jnp.arange(r) < sizes[:, None]) & (trace > 0)[:, None]

        def completed(q: jax.Array) -> jax.Array:
            both = null[:, :, None] & null[:, None, :]
            found = roots.matmul(jnp.swapaxes(q, -2, -1), jnp.asarray(_fixed(r), q.dtype))
            turn = jnp.linalg.qr(jnp.where(both, found, identity))[0]
            return jnp.where(null[:, None, :], roots.matmul(q, jnp.where(both, turn, 0)), q)

        q = jax.lax.cond(jnp.any(null), completed, lambda q: q, q)
        residual = jnp.max(jnp.abs(roots.matmul(jnp.swapaxes(q, -2, -1), q) - identity), axis=(-2, -1))
        rank = jnp.where(largest > 0, 1 / jnp.where(largest > 0, largest, 1), 0)
        finite = jnp.all(jnp.isfinite(stack), axis=(-2, -1))
        accepted = (residual <= ORTHOGONALITY) & (trace > 0) & finite
        seen = jnp.where(finite & (trace > 0), largest, 0)
        return RootResult(q, residual, seen, jnp.zeros_like(residual), rank, accepted)

    def solve_on_host(self, a: np.ndarray, bucket: Any, options: Any) -> tuple[RootResult, int]:
        """Return all eigenvectors, in float64."""
        del bucket, options
        refused = lapack.refused(a)
        if refused.largest <= 0:
            return refused, 0
        try:
            values, q = blas.eigh((a + a.T) / 2)
        except np.linalg.LinAlgError:
            return refused, 0
        values, q = values[::-1], q[:, ::-1]
        null = values <= NULL * values[0]
        turn = blas.orthonormal(blas.product(q[:, null].T, _fixed(len(q))[:, null]))
        q[:, null] = blas.product(q[:, null], turn)
        residual = float(np.max(np.abs(blas.product(q.T, q) - np.eye(len(q)))))
        rank = float(np.trace(a) / values[0])
        return RootResult(q, residual, float(values[0]), 0.0, rank, accepted=True), 0

    def carried(
        self, second_moment: jax.Array, old: Sequence[jax.Array], new: Sequence[jax.Array], sides: Sequence[int]
    ) -> jax.Array:
        """Return (R o R)' V along each side, with R = Q_old' Q_new."""
        weights = []
        for before, after in zip(old, new, strict=True):
            before = _or_identity(before, jnp.max(jnp.abs(before), axis=(-2, -1)) > 0)
            # (R o R)': row i has the weights of the old directions in the new direction i.
            weights.append(jnp.square(roots.matmul(jnp.swapaxes(after, -2, -1), before)))
        return multiplied(second_moment, weights, sides)


def _sorted_columns(x_nrc: jax.Array, key_nc: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_nrc, jnp.argsort(key_nc, axis=-1)[:, None, :], axis=-1)


def _fixed(r: int) -> np.ndarray:
    """Return r fixed random vectors [r, r], whose projections on any subspace are far from dependent."""
    return np.random.default_rng(0).normal(size=(r, r))


def _or_identity(q: jax.Array, found: jax.Array) -> jax.Array:
    return jnp.where(found[:, None, None], q, jnp.eye(q.shape[-1], dtype=q.dtype))
