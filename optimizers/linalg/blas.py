"""Call SciPy's BLAS and LAPACK in float64, with one thread each, so that threads of ours solve in parallel.

The wheels of NumPy and SciPy each have a BLAS of their own: a limit for SciPy's does not touch NumPy's. The functions
of `scipy.linalg` hold Python's lock. `ctypes` releases it around the same routines, which SciPy exports for Cython.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import threadpoolctl

_QR_BLOCK = 64  # columns for which LAPACK gets work space


def one_thread() -> Any:
    """Limit each call of SciPy's BLAS to one thread, in this process, until `restore_original_limits()`.

    More threads would change the last bits. Where SciPy has no BLAS of its own, every BLAS is limited.
    """
    folder = str(Path(_scipy_linalg().__file__).parents[1])  # scipy.libs beside it, or scipy/.dylibs
    found = threadpoolctl.ThreadpoolController()  # of the libraries that are loaded
    own = [library.filepath for library in found.lib_controllers if library.filepath.startswith(folder)]
    return found.select(filepath=own).limit(limits=1) if own else found.limit(limits=1, user_api="blas")


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the matrix product of two float64 matrices."""
    (m, k), n = a.shape, b.shape[1]
    result = np.empty((m, n))
    # BLAS takes columns first. For it, the rows of the result are the columns of b' a'.
    (b, *of_b), (a, *of_a) = _operand(b), _operand(a)
    _call("dgemm", of_b[0], of_a[0], n, m, k, 1.0, b, of_b[1], a, of_a[1], 0.0, result, max(n, 1))
    return result


def eigh(a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the eigenvalues in increasing order, and the eigenvectors as columns, of a symmetric float64 matrix.

    Raises:
      numpy.linalg.LinAlgError: LAPACK did not converge.
    """
    n = len(a)
    w, v = np.empty(n), np.array(a, np.float64, order="C")
    work, whole = np.empty(1 + 6 * n + 2 * n * n), np.empty(3 + 5 * n, np.int64)
    _call("dsyevd", b"V", b"L", n, v, max(n, 1), w, work, work.size, whole, whole.size, info=True)
    return w, v.T


def orthonormal(a: np.ndarray) -> np.ndarray:
    """Return the factor Q of the decomposition a = Q R of a square float64 matrix."""
    n = len(a)
    q, tau, work = np.array(a.T, np.float64, order="C"), np.empty(n), np.empty(max(n, 1) * _QR_BLOCK)
    _call("dgeqrf", n, n, q, max(n, 1), tau, work, work.size, info=True)
    _call("dorgqr", n, n, n, q, max(n, 1), tau, work, work.size, info=True)
    return q.T


def _operand(x: np.ndarray) -> tuple[np.ndarray, bytes, int]:
    """Return a matrix without gaps, whether BLAS must transpose it to get x', and its leading dimension."""
    if x.flags.f_contiguous and not x.flags.c_contiguous:
        return x, b"T", max(x.shape[0], 1)
    return np.ascontiguousarray(x), b"N", max(x.shape[1], 1)


def _scipy_linalg() -> Any:
    """Import SciPy's linear algebra, which takes too long for the start of runs without roots on the host."""
    import scipy.linalg.cython_blas
    import scipy.linalg.cython_lapack

    return scipy.linalg


@functools.cache
def _routine(name: str) -> Callable[..., None]:
    """Return a Fortran routine, which takes the address of every argument."""
    linalg = _scipy_linalg()
    capsule = (linalg.cython_blas.__pyx_capi__ | linalg.cython_lapack.__pyx_capi__)[name]
    signature = _capsule_name(capsule)
    kinds = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *kinds)(_capsule_pointer(capsule, signature))


def _call(name: str, *arguments: Any, info: bool = False) -> None:
    """Call a routine. With `info`, its last argument is the status, which must be 0."""
    # A routine reads 32 or 64 bits of a whole number, which are the same on machines with the lowest byte first.
    status = np.zeros((), np.int64)
    arrays = [x if isinstance(x, np.ndarray) else np.array(x) for x in (*arguments, *((status,) if info else ()))]
    _routine(name)(*(x.ctypes.data for x in arrays))
    if status:
        raise np.linalg.LinAlgError(f"{name} ended with status {status}")


_capsule_name = ctypes.pythonapi.PyCapsule_GetName
_capsule_name.restype, _capsule_name.argtypes = ctypes.c_char_p, [ctypes.py_object]
_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype, _capsule_pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
