"""Compare inverse roots with float64, for every solver, alone and in mixed batches."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec

from shampax.optimizers import ShampooOptions, distributed_shampoo
from shampax.optimizers.linalg import newton, roots
from shampax.optimizers.linalg.precision import precision_of
from shampax.optimizers.roots import SOLVERS, inverse_pth_root


def solvers_with(values, fast):
    """Return pairs of solver and value. Slow are device solvers that are not in `fast`, solver -> value."""
    return [
        pytest.param(solver, x, marks=() if fast.get(solver, x) == x else pytest.mark.slow)
        for solver in SOLVERS
        for x in values
    ]


def matrix(eigenvalues, seed=0):
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return (q * np.asarray(eigenvalues)) @ q.T


def spread(n, condition):
    return np.logspace(0, -np.log10(condition), n)


def half_rank(n):
    return np.where(np.arange(n) < n // 2, spread(n, 100.0), 0)


def with_negative(n, condition):
    return np.append(spread(n - 1, condition), -1e-3)


def exact(a, p, ridge=0.0, cut=0.0):
    w, v = np.linalg.eigh(np.asarray(a, np.float64))
    kept = w > cut * w[-1] if cut else w == w
    w = np.where(kept, np.maximum(w, 0) + ridge * w[-1], 1)
    return (v * np.where(kept, w ** (-1 / p), 0)) @ v.T


def error(root, wanted):
    return np.linalg.norm(np.asarray(root, np.float64) - wanted) / np.linalg.norm(wanted)


@functools.cache
def solve(solver, p, ridge=0.0, cut=0.0):
    """Compile once per shape for all tests. The host's solver is not compiled."""
    function = functools.partial(inverse_pth_root, p=p, solver=solver, ridge=ridge, cut=cut)
    return function if solver == "host" else jax.jit(function)


@pytest.mark.parametrize(("solver", "p"), solvers_with((1, 2, 4), {"newton": 0, "eigh": 2}))
def test_condition_1e12_and_low_rank_with_a_small_ridge(solver, p):
    """Fault: rounding mixes the eigenvectors of the smallest eigenvalues, and a root with error 0.05 is accepted."""
    spectra = [spread(128, 1e12), *(np.where(np.arange(128) < rank, spread(128, 100), 0) for rank in (16, 64, 127))]
    stack = np.stack([matrix(w, seed) for seed, w in enumerate(spectra)]).astype(np.float32)
    result = solve(solver, p, ridge=1e-6)(stack)
    for a, root, residual in zip(stack, result.root, result.residual, strict=True):
        wanted = exact(a, p, ridge=1e-6)
        difference = np.linalg.norm(np.asarray(root, np.float64) - wanted, 2) / np.linalg.norm(wanted, 2)
        assert difference <= (0.02 if solver == "newton" else 0.02 / p) or residual > 0.1


@pytest.mark.parametrize("p", [2, pytest.param(4, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ridge", [1e-4, pytest.param(1e-2, marks=pytest.mark.slow)])
def test_roots_by_minimax_polynomials(p, ridge):
    """Faults: the interval of the polynomials does not reach down to the ridge; a step is missing; rounding errors of
    the coupled iteration grow."""
    n = 96
    ranks = [np.where(np.arange(n) < rank, spread(n, 10.0), 0) for rank in (n // 4, n // 2, n)]
    spectra = [*(spread(n, 10.0**k) for k in (2, 4, 6, 8, 12)), *ranks]
    stack = np.stack([matrix(w, seed) for seed, w in enumerate(spectra)]).astype(np.float32)
    result = solve("newton", p, ridge)(stack)
    for a, root in zip(stack, result.root, strict=True):
        assert error(root, exact(a, p, ridge)) <= 3e-4
    assert np.all(np.asarray(result.residual) <= 0.005 * p)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("n", "p"),
    [
        *((7, p) for p in (1, 3, 4, 8)),
        (1, 3),
        *(pytest.param(n, p, marks=pytest.mark.slow) for n, p in [(7, 2), (7, 6), (2, 4), (128, 4)]),
    ],
)
def test_multiples_of_the_identity_at_any_scale(solver, n, p):
    """Fault: a solver overflows, underflows or has an absolute tolerance."""
    scales = np.array([1e-30, 1e-10, 1.0, 3.0, 1e30])
    stack = (scales[:, None, None] * np.eye(n)).astype(np.float32)
    result = solve(solver, p)(stack)
    for a, root in zip(stack, result.root, strict=True):
        assert error(root, float(a[0, 0]) ** (-1 / p) * np.eye(n)) <= 1e-5
    assert np.all(np.asarray(result.residual) <= 1e-5)
    np.testing.assert_allclose(result.largest, stack[:, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(result.condition, 1, rtol=1e-4)
    np.testing.assert_allclose(result.effective_rank, n, rtol=1e-5)


@pytest.mark.parametrize(("solver", "p"), solvers_with([2, 4], {"newton": 2, "eigh": 4}))
def test_known_condition_numbers(solver, p):
    """Fault: lost precision. The batch mixes condition numbers, and each matrix has its own bound."""
    bounds = {1e2: 1e-5, 1e4: 5e-4, 1e6: 5e-3}
    stack = np.stack([matrix(spread(256, condition)) for condition in bounds]).astype(np.float32)
    result = solve(solver, p)(stack)
    for i, (condition, bound) in enumerate(bounds.items()):
        # Double precision is exact to float32.
        assert error(result.root[i], exact(stack[i], p)) <= {"host": 1e-6, "eigh": 1e-4}.get(solver, bound)
        assert condition / 1.5 <= result.condition[i] <= condition * 1.2
    assert np.all(np.asarray(result.residual) <= [1e-3, 1e-2, 0.1])
    np.testing.assert_allclose(result.effective_rank, np.trace(stack, axis1=1, axis2=2), rtol=0.02)


@pytest.mark.parametrize(("solver", "p"), solvers_with([2, 4], {"newton": 4, "eigh": 2}))
def test_ridge_on_matrices_that_float32_cannot_resolve(solver, p):
    """Faults: the ridge is lost in rounding; the residual is taken from the iteration, which gives 1e-7 for any
    root."""
    ridge, n = 1e-6, 256
    spectra = spread(n, 1e8), spread(n, 1e12), half_rank(n), spread(n, 1e3)
    stack = (np.stack([matrix(w) for w in spectra]) * 1e-16).astype(np.float32)
    result = solve(solver, p, ridge)(stack)
    for a, root, residual in zip(stack, result.root, result.residual, strict=True):
        assert error(root, exact(a, p, ridge)) <= 2e-2
        largest = np.linalg.norm(a.astype(np.float64), 2)
        assert np.linalg.norm(np.asarray(root, np.float64), 2) <= 1.02 * (ridge * largest) ** (-1 / p)
        assert np.array_equal(root, root.T)
        half = np.linalg.matrix_power(np.asarray(root, np.float64), p // 2)
        recomputed = np.max(np.abs(half @ (a + ridge * largest * np.eye(n)) @ half - np.eye(n)))
        assert residual >= recomputed / 5 or solver == "host"  # its root is rounded to float32
    assert np.all(np.asarray(result.residual) <= 0.1)
    np.testing.assert_allclose(result.condition, [1e6, 1e6, 1e6, 1e3], rtol=0.2)


@pytest.mark.parametrize(("solver", "ridge"), solvers_with([1e-6, 1e-4], {"newton": 1e-6, "eigh": 1e-4}))
def test_negative_eigenvalues_count_as_zero_or_are_refused(solver, ridge):
    """Fault: Newton returns an invalid root of a matrix with an eigenvalue below the ridge, or changes another matrix
    of the batch."""
    n = 64
    rounded = np.asarray(jnp.asarray(matrix(half_rank(n)), jnp.bfloat16), np.float32)
    small = matrix(np.append(spread(n - 1, 1e2), -0.01 * ridge))
    stack = [matrix(spread(n, 1e3)), small, matrix(with_negative(n, 1e2)), matrix(with_negative(n, 1e8)), rounded]
    result = solve(solver, 4, ridge)(np.stack(stack).astype(np.float32))
    sound = 2 if solver == "newton" else 5
    for a, root in zip(np.stack(stack[:sound]).astype(np.float32), result.root, strict=False):
        assert error(root, exact(a, 4, ridge)) <= 1e-2
        assert np.array_equal(root, root.T)
    accepted = np.asarray(result.residual) <= 0.1
    assert list(accepted) == [i < sound for i in range(5)]
    alone = solve(solver, 4, ridge)(np.stack([stack[0]] * 5).astype(np.float32))
    assert np.array_equal(alone.root[0], result.root[0])


@pytest.mark.parametrize(("solver", "p"), [("eigh", 4), pytest.param("eigh", 2, marks=pytest.mark.slow), ("host", 2)])
def test_cut_removes_small_eigenvalues(solver, p):
    """Fault: the pseudo-inverse lets noise directions through, or is only right far above the cut."""
    n, cut = 32, 1e-4
    b = np.random.default_rng(0).normal(size=(n, 3))
    above = np.append(spread(9, 1e3), np.full(n - 9, 1e-5))
    stack = np.stack([b @ b.T, matrix(with_negative(n, 1e2)), matrix(above), matrix(half_rank(n))]).astype(np.float32)
    result = solve(solver, p, cut=cut)(stack)
    for a, root in zip(stack, result.root, strict=True):
        root = np.asarray(root, np.float64)
        assert error(root, exact(a, p, cut=cut)) <= 1e-3
        w, v = np.linalg.eigh(a.astype(np.float64))
        v = v[:, w > cut * w[-1]]
        assert np.linalg.norm(root - v @ v.T @ root) <= 1e-5 * np.linalg.norm(root)
    assert np.all(np.asarray(result.residual) <= 1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
@settings(max_examples=12, deadline=None)
@given(
    size=st.sampled_from([1, 11]),
    exponent=st.integers(-60, 60),
    condition=st.floats(1, 8),
    seed=st.integers(0, 99),
    filling=st.sampled_from([0.0, 1e9, np.nan]),
)
def test_padding_changes_nothing(solver, size, exponent, condition, seed, filling):
    """Fault: padding enters the ridge, the scale, the convergence or the diagnostics of the real part."""
    small = (matrix(spread(size, condition), seed) * 2.0**exponent).astype(np.float32)
    padded = np.full((2, 12, 12), filling, np.float32)
    padded[0, :size, :size] = small
    function = solve(solver, 4, 1e-4)
    result, alone = function(padded, sizes_n=np.array([size, 0])), function(small[None])
    # Another length sums in another order.
    bound = 1e-5 if solver == "newton" else 1e-6
    assert error(result.root[0, :size, :size], np.asarray(alone.root[0], np.float64)) <= bound
    assert not np.any(result.root[0, size:]) and not np.any(result.root[0, :, size:]) and not np.any(result.root[1])
    assert np.all(np.asarray(result.residual) <= [1e-4, 1])
    for name in ("largest", "condition", "effective_rank"):
        np.testing.assert_allclose(getattr(result, name)[0], getattr(alone, name)[0], rtol=0.1 if size > 1 else 1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n", [1, 7])
def test_zero_and_non_finite_matrices_do_not_change_others(solver, n):
    """Faults: a parameter without gradients gives NaN; a bad gradient reaches other blocks."""
    good = matrix(spread(n, 1e3))
    zero, nan, infinite = np.zeros((n, n)), np.where(np.eye(n), good, np.nan) * np.nan, good + np.inf
    function = solve(solver, 4, 1e-6)
    result = function(np.stack([good, zero, nan, infinite, good]).astype(np.float32))
    alone = function(np.stack([good] * 5).astype(np.float32))
    for mixed, expected in zip(result[:5], alone[:5], strict=True):
        np.testing.assert_array_equal(np.asarray(mixed)[[0, 4]], np.asarray(expected)[[0, 4]])
    np.testing.assert_array_equal(result.residual[1:4], [1, np.nan, np.nan])
    np.testing.assert_array_equal(result.condition[1:4], 1)
    for x in (result.root, result.largest, result.effective_rank):
        assert not np.any(x[1:4])


@pytest.mark.parametrize(("solver", "p"), solvers_with([2, 4], {"newton": 2, "eigh": 4}))
def test_residual_shows_an_inaccurate_root(solver, p):
    """Fault: the residual is small because one wrong direction is spread over 256 small entries."""
    direction = np.full((256, 256), 1 / 256)
    indefinite = np.eye(256) - (1 + 2.0**-10) * direction
    stack = np.stack([matrix(spread(256, 1e12)), matrix(half_rank(256)), indefinite, matrix(spread(256, 10.0))])
    stack = stack.astype(np.float32)
    result = solve(solver, p)(stack)
    assert not np.any(np.asarray(result.residual[:3]) <= 0.1)
    right = roots.residual(*roots.halves(result.root, p), stack, np.eye(256))
    wrong = roots.residual(*roots.halves(1.5 * result.root, p), stack, np.eye(256))
    assert right[3] <= 1e-4 and wrong[3] > 0.1


def test_residual_shows_an_iteration_that_did_not_converge(monkeypatch):
    """Fault: a root is returned unchecked after the last iteration."""
    stack = matrix(spread(64, 1e6))[None].astype(np.float32)
    schedule = newton.newton_schedule
    monkeypatch.setattr(newton, "newton_schedule", lambda p, smallest: schedule(p, smallest)[:5])
    assert jax.jit(functools.partial(inverse_pth_root, p=4))(stack).residual[0] > 0.1


@pytest.mark.parametrize(
    ("solver", "regulariser"), [("newton", {"ridge": 1e-5}), ("eigh", {"ridge": 1e-5}), ("eigh", {"cut": 1e-5})]
)
def test_inside_shard_map(solver, regulariser):
    """Faults: the loop waits for matrices of other devices; the batch is unrolled into the program."""
    spectra = [spread(32, 1e2), half_rank(32), np.ones(32), spread(32, 1e3), np.zeros(32)]
    stack = np.stack([matrix(spectra[i % 5], seed=i) for i in range(16)]).astype(np.float32)
    function = functools.partial(inverse_pth_root, p=4, solver=solver, **regulariser)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("devices")
    # check_vma as in the optimizer: the loop inside eigh cannot pass the check.
    sharded = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=solver == "newton"))
    compiled = sharded.lower(stack).compile()
    assert not re.search("all-|collective|reduce-scatter", compiled.as_text())
    lines = [len(jax.jit(function).lower(stack[:n]).as_text().splitlines()) for n in (2, 16)]
    assert lines[1] <= 1.1 * lines[0]  # earlier traces may be shared or not
    result = compiled(stack)
    for i, (a, root) in enumerate(zip(stack, result.root, strict=True)):
        assert (error(root, exact(a, 4, **regulariser)) <= 1e-2) if np.any(a) else not np.any(root), i
    np.testing.assert_array_less(result.residual, np.where(np.any(stack, axis=(1, 2)), 0.1, 1.1))


@pytest.mark.parametrize(
    ("solver", "arguments"), [("newton", {"ridge": 1e-6}), ("eigh", {"ridge": 1e-6}), ("eigh", {"cut": 1e-6})]
)
def test_precision_is_pinned(solver, arguments):
    """Fault: a product uses the global precision. On an accelerator, Newton would never converge."""
    with jax.default_matmul_precision("bfloat16"):
        text = jax.jit(lambda x: inverse_pth_root(x, 3, solver=solver, **arguments)).lower(jnp.ones((2, 32, 32)))
    dots = [line for line in text.as_text().splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST, HIGHEST" in line for line in dots)


def test_eigh_is_one_batched_call():
    """Fault: there are two independent LAPACK calls, which can deadlock a CPU."""
    text = jax.jit(lambda x: inverse_pth_root(x, 4, solver="eigh", ridge=1e-6)).lower(jnp.ones((3, 8, 8))).as_text()
    assert len(re.findall(r"custom_call\s*@lapack", text)) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"p": 0}, "positive integer"),
        ({"p": 4, "solver": "svd"}, "must be one of"),
        ({"p": 4, "ridge": 1e-6, "cut": 1e-6}, "only one"),
        ({"p": 4, "cut": 1e-6}, "'eigh' or 'host'"),
    ],
)
def test_invalid_arguments(arguments, words):
    """Fault: arguments are misread without an error."""
    with pytest.raises(ValueError, match=words):
        inverse_pth_root(np.eye(2)[None], **arguments)


PASSES = {"tpu": jax.lax.Precision.HIGH, "gpu": jax.lax.DotAlgorithmPreset.BF16_BF16_F32_X3}
FULL, ONE = jax.lax.Precision.HIGHEST, jax.lax.Precision.DEFAULT


@pytest.mark.parametrize(
    ("kind", "platform", "ridge", "expected"),
    [
        *(("auto", platform, 1e-4, (passes, passes, ONE)) for platform, passes in PASSES.items()),
        ("auto", "tpu", 1e-5, (PASSES["tpu"], FULL, ONE)),
        ("auto", "tpu", 0.0, (FULL, FULL, ONE)),
        ("auto", "cpu", 1e-4, (FULL, FULL, FULL)),
        ("float32", "gpu", 1e-4, (FULL, FULL, FULL)),
    ],
)
def test_precision_by_need(monkeypatch, kind, platform, ridge, expected):
    """Faults: TF32 in a solver; bfloat16 passes where the ridge is as small as their rounding."""
    assert precision_of(kind, platform, ridge) == expected
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    options = ShampooOptions(block_size=8, precision=kind, ridge=ridge, orthogonalize=3)
    rows = 5 + ("tpu", "gpu", "cpu").index(platform)  # equal programs would be traced once
    tx, params = distributed_shampoo(1.0, options), {"w": jnp.ones((rows, 6))}
    text = str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))
    named = re.findall(r"precision=\(?(?:\w+\.)?(\w+)", text)
    # Norms and largest eigenvalues are in full precision.
    assert set(named) == {FULL.name, *(each.name for each in expected)}
