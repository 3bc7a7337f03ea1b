"""Sketches of statistics: what is kept, the factors of it, and how they act."""

import functools

import jax
import numpy as np
import pytest
from optimizing import gradients, train

from shampax.optimizers import ShampooOptions
from shampax.optimizers.linalg import lapack, sketch

R, RANK = 60, 21  # 20 directions and the diagonal


def statistics(values, seed=0):
    """[60, 60] with given eigenvalues."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(R, R)))[0]
    return (q * values) @ q.T


multiplied = jax.jit(functools.partial(sketch.multiplied, side=0))


@functools.cache
def on_device(p, ridge):
    return jax.jit(lambda stack, sizes: sketch.inverse_root(stack, p, ridge, sizes))


def dense(factor):
    """The matrix that acts as a factor [r, rank] does."""
    acting = multiplied(np.eye(len(factor), dtype=np.float32)[None], np.asarray(factor, np.float32)[None])
    return np.asarray(acting[0], np.float64)


def both(a, p=2, ridge=1e-2):
    """The factor found on the host, and on a device."""
    host = sketch.inverse_root_on_host(a, len(a), p, ridge)
    device = on_device(p, ridge)(np.asarray(a, np.float32)[None], np.array([len(a)]))
    return host, device


@pytest.mark.parametrize("p", [2, 3, *(pytest.param(p, marks=pytest.mark.slow) for p in (1, 4))])
def test_statistics_of_low_rank_are_known_whole(p):
    """Catches a wrong power, ridge or scale, directions that are lost, and a host that answers otherwise."""
    a = 1e5 * statistics(np.where(np.arange(R) < 15, np.arange(R) + 1.0, 0))
    wanted = lapack.inverse_root(a, p, 1e-2, 0.0)
    host, device = both(sketch.of(a, RANK), p)
    assert np.linalg.norm(dense(host.root) - wanted.root) <= 1e-5 * np.linalg.norm(wanted.root)
    assert np.linalg.norm(dense(device.root[0]) - wanted.root) <= 1e-4 * np.linalg.norm(wanted.root)
    for found in (host, device):
        assert np.ravel(found.largest)[0] == pytest.approx(wanted.largest, rel=1e-5)
        assert np.ravel(found.condition)[0] == pytest.approx(wanted.condition, rel=1e-3)
        assert np.ravel(found.effective_rank)[0] == pytest.approx(wanted.effective_rank, rel=1e-5)
        assert np.ravel(found.residual)[0] <= 1e-4


def test_what_a_sketch_has_not_seen_is_spread_evenly():
    """Catches a rest of the trace that is forgotten: small directions would be lengthened without measure."""
    a = statistics(np.where(np.arange(R) < 5, 1.0, 1e-2))
    factor = dense(both(sketch.of(a, RANK), ridge=1e-6)[0].root)
    whitened = np.linalg.eigvalsh(factor @ a @ factor)
    assert whitened.min() > 0.3 and whitened.max() < 1.5


def test_padding_is_no_part_of_it():
    """Catches rows of padding that count as directions, or that a factor fills."""
    a = statistics(1.0 / np.arange(1, R + 1))
    for size in (R, 30):  # of 30 rows, less than two for each direction
        part = sketch.of(a[:size, :size], RANK)
        held = np.pad(part, ((0, 80 - size), (0, 0)))
        host = sketch.inverse_root_on_host(held, size, 2, 1e-2).root
        alone = sketch.inverse_root_on_host(part, size, 2, 1e-2).root
        device = np.asarray(on_device(2, 1e-2)(np.asarray(held, np.float32)[None], np.array([size])).root)
        assert not host[size:].any() and not device[0, size:].any()
        np.testing.assert_allclose(dense(host)[:size, :size], dense(alone), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(dense(device[0])[:size, :size], dense(alone), rtol=1e-3, atol=1e-3)


def test_directions_are_for_ever():
    """Catches another choice of directions, which would make nonsense of the sketches in every checkpoint; and one that
    depends on the length of the side, which padding changes."""
    w = sketch.directions(64, 20, np)
    assert ["".join("+-"[int(x < 0)] for x in row) for row in w[:2]] == FIRST
    np.testing.assert_array_equal(np.asarray(sketch.directions(64, 20)), w)
    np.testing.assert_array_equal(sketch.directions(48, 20, np), w[:48])
    w = sketch.directions(1024, 127, np)
    assert np.abs(w.T @ w / 1024 - np.eye(127)).max() < 6 / np.sqrt(1024)


FIRST = ["-+++++----+++-----+-", "+-+------++-+-+--+-+"]


def test_a_sketch_of_products_is_the_product_s_sketch():
    """Catches a contraction over the wrong side; sketches are linear, so averages of them are those of averages."""
    x = np.random.default_rng(0).normal(size=(2, 5, 40, 6)).astype(np.float32)
    for side, length in enumerate(x.shape[1:]):
        u = np.moveaxis(x, side + 1, 1).reshape(2, length, -1)
        wanted = sketch.of(u @ np.swapaxes(u, 1, 2), 9)
        found = jax.jit(functools.partial(sketch.moments, side=side, rank=9))(x)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-3)


def test_rounding_a_factor_turns_no_direction_round():
    """Catches a column that, stored in few bits, is longer than c: the direction seen most would be climbed."""
    a = sketch.of(statistics(np.where(np.arange(R) < 1, 1.0, 1e-9)), RANK)
    factor = both(a, ridge=1e-8)[0].root
    factor[:, :-1] *= 1.01
    assert np.linalg.eigvalsh(dense(factor)).min() >= -1e-3 * np.abs(factor[0, -1])


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_gradients_changes_no_direction(scale):
    """Catches squares of a factor that leave float32 where neither gradients nor their roots do."""
    stream = gradients(6, {"w": (32, 20)})
    options = ShampooOptions(rank=6, interval=1, graft="sgd", exponent=0.5)
    moved = [train(options, [{"w": g["w"] * np.float32(s)} for g in stream]).updates[-1]["w"] for s in (1, scale)]
    np.testing.assert_allclose(moved[1] / scale, moved[0], rtol=1e-4, atol=1e-5)


def test_nothing_and_infinities_have_no_factor():
    """Catches a sketch of nothing, or of NaN, that is answered as if it were sound."""
    stack = np.zeros((2, R, RANK), np.float32)
    stack[1, 3, 4] = np.nan
    found = on_device(2, 1e-4)(stack, np.array([R, R]))
    assert not np.any(found.root[0]) and found.residual[0] == 1 and np.isnan(found.residual[1])
    assert sketch.inverse_root_on_host(np.zeros((R, RANK)), R, 2, 1e-4).residual == 1


def test_memory_is_that_of_the_rank():
    """Catches sides that are kept whole beside a rank, or sketched where half of a matrix is less."""
    options = ShampooOptions(rank=8, block_size=64)
    run = train(options, gradients(12, {"w": (64, 16)}))
    (bucket,) = run.states[-1].buckets.values()
    assert sorted(x.shape[1:] for x in bucket.roots.statistics) == [(17, 8), (64, 8)]  # 16 x 16 packed, 64 in a sketch
    assert [x.shape for x in bucket.roots.roots] == [x.shape for x in bucket.roots.statistics]
    assert int(bucket.roots.refreshes.sum()) >= 1 and int(bucket.roots.failures.sum()) == 0
