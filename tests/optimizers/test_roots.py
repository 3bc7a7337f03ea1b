import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampax.optimizers.roots import SOLVERS, inverse_pth_root

RANDOM = np.random.default_rng(0)


def matrix(n, condition):
    q, _ = np.linalg.qr(RANDOM.normal(size=(n, n)))
    return (q * np.logspace(0, -np.log10(condition), n)) @ q.T


def exact(a, p, ridge=0.0, cut=0.0):
    w, v = np.linalg.eigh(a)
    w = np.maximum(w, 0)
    if cut:
        kept = w > cut * w[-1]
        return (v * np.where(kept, np.where(kept, w, 1) ** (-1 / p), 0)) @ v.T
    return (v * (w + ridge * w[-1]) ** (-1 / p)) @ v.T


def error(result, wanted):
    return np.linalg.norm(np.asarray(result, np.float64) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
def test_multiples_of_the_identity_at_any_scale(solver, p):
    """Catches a solver that overflows, underflows or has an absolute tolerance."""
    scales = np.array([1e-30, 1e-10, 1.0, 1e30])
    for n in (1, 7):
        stack = (scales[:, None, None] * np.eye(n)).astype(np.float32)
        root = inverse_pth_root(stack, p, solver=solver).root
        wanted = stack.astype(np.float64)[:, 0, 0] ** (-1 / p)
        np.testing.assert_allclose(np.asarray(root, np.float64), wanted[:, None, None] * np.eye(n), rtol=1e-5)


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("solver", SOLVERS)
def test_known_condition_numbers(solver, p):
    """Catches lost precision: the batch mixes conditions, and each matrix meets its own bound."""
    conditions = {1e2: 1e-5, 1e4: 5e-4} | ({} if solver == "eigh" else {1e6: 2e-2})
    stack = np.stack([matrix(64, condition) for condition in conditions]).astype(np.float32)
    result = inverse_pth_root(stack, p, solver=solver)
    for a, root, residual, bound in zip(stack, result.root, result.residual, conditions.values(), strict=True):
        assert error(root, exact(a.astype(np.float64), p)) <= bound
        assert residual <= 100 * bound


@pytest.mark.parametrize("solver", SOLVERS)
def test_ridge_on_a_singular_matrix(solver):
    """Catches a ridge that is absolute, or relative to something other than the largest eigenvalue."""
    b = RANDOM.normal(size=(64, 32)) * 1e-8
    a = b @ b.T
    root = inverse_pth_root(a[None].astype(np.float32), 4, solver=solver, ridge=1e-4).root[0]
    assert error(root, exact(a, 4, ridge=1e-4)) <= 1e-3
    assert np.linalg.norm(np.asarray(root, np.float64), 2) <= 1.02 * (1e-4 * np.linalg.norm(a, 2)) ** -0.25


@pytest.mark.parametrize("solver", SOLVERS)
def test_cut_leaves_nothing_outside_the_range(solver):
    """Catches a pseudo-inverse that lets noise directions through."""
    b = RANDOM.normal(size=(32, 3))
    q, _ = np.linalg.qr(b)
    root = np.asarray(inverse_pth_root((b @ b.T)[None], 4, solver=solver, cut=1e-4).root[0], np.float64)
    assert error(root, exact(b @ b.T, 4, cut=1e-4)) <= 1e-3
    assert np.linalg.norm(root - q @ q.T @ root) <= 1e-5 * np.linalg.norm(root)


@pytest.mark.parametrize("solver", SOLVERS)
def test_padding_changes_nothing(solver):
    """Catches padding that enters the ridge, the norm or the convergence of the real part."""
    small = matrix(11, 1e3).astype(np.float32)
    padded = np.zeros((2, 16, 16), np.float32)
    padded[0, :11, :11] = small
    result = inverse_pth_root(padded, 4, solver=solver, ridge=1e-5, sizes_n=jnp.array([11, 0]))
    alone = inverse_pth_root(small[None], 4, solver=solver, ridge=1e-5)
    np.testing.assert_allclose(result.root[0, :11, :11], alone.root[0], rtol=1e-4, atol=1e-5)
    assert not np.any(result.root[0, 11:]) and not np.any(result.root[0, :, 11:]) and not np.any(result.root[1])


@pytest.mark.parametrize("solver", SOLVERS)
def test_zero_matrix_has_the_zero_root_and_residual_one(solver):
    """Catches infinity or NaN where a parameter has had no gradient."""
    result = inverse_pth_root(np.zeros((1, 1, 1)), 4, solver=solver, ridge=1e-6)
    assert np.array(result.root) == 0 and result.residual == 1 and result.largest == 0


def test_residual_is_recomputed_not_believed():
    """Catches a residual read off the coupled iterate, which says 1e-7 where the root is useless."""
    hopeless = matrix(64, 1e12).astype(np.float32)
    assert not inverse_pth_root(hopeless[None], 4).residual[0] <= 0.1


def test_precision_is_pinned():
    """Catches a matmul that follows the global precision: on an accelerator Newton would never converge."""
    stack = jnp.asarray(matrix(32, 1e3)[None], jnp.float32)
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lambda x: inverse_pth_root(x, 4)).lower(stack).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST, HIGHEST" in line for line in dots)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"p": 0}, "positive integer"),
        ({"p": 4, "solver": "svd"}, "choose one of"),
        ({"p": 4, "ridge": 1e-6, "cut": 1e-6}, "only one"),
    ],
)
def test_bad_arguments(arguments, words):
    """Catches arguments that would be silently misread."""
    with pytest.raises(ValueError, match=words):
        inverse_pth_root(np.eye(2)[None], **arguments)
