import threading
import time

import numpy as np
import pytest
import threadpoolctl

from shampax.optimizers.linalg import blas
from shampax.optimizers.linalg.lapack import inverse_root


def matrix(rows, columns):
    return np.random.default_rng(0).normal(size=(rows, columns))


@pytest.mark.parametrize(("m", "k", "n"), [(5, 7, 3), (1, 4, 1), (40, 1, 9), (0, 3, 2), (2, 0, 3)])
@pytest.mark.parametrize("of_a", ["rows first", "columns first", "with gaps"])
@pytest.mark.parametrize("of_b", ["rows first", "columns first"])
def test_products_of_matrices_of_every_layout(m, k, n, of_a, of_b):
    """Faults: the order of axes or the leading dimension is wrong; empty matrices are refused or not cleared."""
    a = {"rows first": matrix(m, k), "columns first": matrix(k, m).T, "with gaps": matrix(m, 2 * k)[:, ::2]}[of_a]
    b = matrix(k, n) if of_b == "rows first" else matrix(n, k).T
    np.testing.assert_allclose(blas.product(a, b), a @ b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("n", [0, 1, 2, 33, 100])
def test_decompositions(n):
    """Faults: eigenvectors are rows; the matrix given is overwritten."""
    a = matrix(n, n) + matrix(n, n).T
    given = a.copy()
    w, v = blas.eigh(a)
    np.testing.assert_allclose(w, np.linalg.eigh(a)[0], atol=1e-12)
    np.testing.assert_allclose(a @ v, v * w, atol=1e-12)
    q, wanted = blas.orthonormal(a), np.linalg.qr(a)[0]
    np.testing.assert_allclose(q, wanted, atol=1e-10)
    np.testing.assert_array_equal(a, given)


def test_a_solver_that_fails_is_an_error():
    """Fault: LAPACK's status is ignored, and a block gets a root of garbage."""
    with pytest.raises(np.linalg.LinAlgError, match="status"):
        blas.eigh(np.full((8, 8), np.nan))


def threads():
    """Return the threads of NumPy's BLAS and of SciPy's."""
    found = {info["filepath"]: info["num_threads"] for info in threadpoolctl.threadpool_info()}
    return tuple(
        next(count for path, count in found.items() if f"/{name}.libs/" in path) for name in ("numpy", "scipy")
    )


def test_a_limit_leaves_the_users_blas_alone():
    """Faults: NumPy's products take one thread while a service exists; its threads change the roots' last bits."""
    a = matrix(200, 200)
    a = a @ a.T
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        limit = blas.one_thread()
        assert threads() == (3, 1)
        root = inverse_root(a, 4, 1e-6, 0.0).root
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            np.testing.assert_array_equal(inverse_root(a, 4, 1e-6, 0.0).root, root)
        limit.restore_original_limits()
        assert threads() == (3, 3)


def test_other_threads_run_during_a_solve():
    """Fault: a solve holds Python's lock, and the devices wait for their next step."""
    blas.eigh(matrix(2, 2))  # imports SciPy
    a, pauses, last = matrix(500, 500), [], time.perf_counter()
    thread = threading.Thread(target=blas.eigh, args=(a + a.T,))
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        pauses.append(now - last)
        last = now
    assert len(pauses) > 5
