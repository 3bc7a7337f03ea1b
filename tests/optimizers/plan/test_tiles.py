import math
import re

import jax
import numpy as np
import numpy_blocks
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.optimizers import ShampooOptions
from shampax.optimizers.plan.blocks import make_plan, parameters
from shampax.optimizers.plan.tiles import SMALLEST_TILE, from_tiles, slice_tiles, to_tiles

MESH = {"x": 2, "y": 4}
FOLDED = ("embed", "heads", "head_dim")
# name -> (shape, axis names, spec, treatment, expected tile, expected copies of a shard)
LAYOUTS = {
    "replicated": ((24, 40), None, P(), "", (12, 14), 8),
    "no multiple of the copies": ((3, 5), None, P(), "", (3, 5), 8),
    "fsdp": ((32, 40), None, P("x"), "", (16, 14), 4),
    "fsdp, short rows": ((32, 40), None, P(("x", "y")), "", (4, 14), 1),
    "tensor": ((24, 64), None, P(None, "y"), "", (12, 16), 2),
    "fsdp and tensor": ((32, 64), None, P("x", "y"), "", (16, 16), 1),
    "longer side first": ((96, 32), None, P("y", "x"), "", (16, 8), 1),
    "axes in another order": ((32, 24), None, P(("y", "x")), "", (12, 4), 1),
    "stack": ((4, 24, 40), ("layers", "a", "b"), P("x"), "", (12, 14), 4),
    "stack and side": ((4, 24, 64), ("layers", "a", "b"), P("x", None, "y"), "", (12, 16), 1),
    "stack twice": ((4, 2, 8, 12), ("layers", "experts", "a", "b"), P("y", "x"), "", (8, 12), 1),
    "major fold axis": ((24, 8, 4), FOLDED, P(None, "y"), "", (12, 8), 2),
    "minor fold axis": ((24, 4, 16), FOLDED, P(None, None, "x"), "", (12, 8), 4),
    "both fold axes": ((24, 4, 16), FOLDED, P(None, "y", "x"), "", (12, 8), 1),
    "conv, channels out": ((3, 3, 4, 32), None, P(None, None, None, "x"), "", (16, 12), 4),
    "conv, channels in": ((3, 3, 16, 8), None, P(None, None, "x"), "block_size=24", (8, 8), 4),
    "conv, channels in, one block": ((3, 3, 8, 16), None, P(None, None, "x"), "block_size=72", (16, 4), 4),
    "3-D": ((24, 8, 16), None, P("y", None, "x"), "view=tensor", (8, 8, 6), 1),
    "axis of length one": ((24, 1, 16, 1), None, P("x"), "view=tensor", (16, 12), 4),
    "one block with padding": ((66, 20), None, P("x"), "block_size=80", (20, 33), 4),
    "falls back": ((40, 24), None, P("y"), "", (12, 14), 8),
    "falls back on one side": ((40, 32), None, P("y", "x"), "", (16, 14), 4),
}


def tiling_of(shape, names, spec, words="", mesh=MESH, block_size=16):
    """Return the tiling of a parameter, or None if it is not a matrix."""
    options = ShampooOptions(block_size=block_size, treatments=((".*", f"shampoo {words}"),))
    params, axis_names = {"w": np.ones(shape)}, {"w": names} if names else None
    buckets = make_plan(parameters(params, axis_names, {"w": spec}), options, mesh).buckets
    return buckets[0].leaves[0].tiling if buckets else None


@pytest.mark.parametrize("name", LAYOUTS)
def test_tile_lengths(name):
    """Faults: tiles are shorter than necessary, so that messages are single elements; matching shards are gathered."""
    *layout, tile, copies = LAYOUTS[name]
    tiling = tiling_of(*layout)
    assert (tiling.tile, tiling.copies) == (tile, copies)
    assert tiling.slice == math.ceil(math.prod(tile) / copies)
    assert (np.multiply(tiling.per_block, tile) <= tiling.block).all()


@pytest.mark.parametrize("fits", [True, False])
def test_tiles_on_devices(fits):
    """Faults: a wrong transpose, fold or padding; a tile is not on the device of its shard; a layout that matches has
    traffic."""
    mesh = Mesh(np.array(jax.devices()).reshape(tuple(MESH.values())), tuple(MESH))
    chosen = {name: layout for name, layout in LAYOUTS.items() if name.startswith("falls back") != fits}
    tilings = {name: tiling_of(*layout[:4]) for name, layout in chosen.items()}
    params = {name: numpy_blocks.numbered(layout[0]) for name, layout in chosen.items()}
    shardings = {name: NamedSharding(mesh, layout[2]) for name, layout in chosen.items()}

    def cut(params):
        whole = {name: to_tiles(x, tilings[name], mesh) for name, x in params.items()}
        return {name: slice_tiles(x, tilings[name], mesh) for name, x in whole.items()}

    def join(tiles):
        whole = {
            name: lax.with_sharding_constraint(x, NamedSharding(mesh, tilings[name].spec(())))
            for name, x in tiles.items()
        }
        return {name: from_tiles(x, tilings[name], mesh) for name, x in whole.items()}

    program = jax.jit(cut, in_shardings=(shardings,)).lower(params).compile()
    if fits:
        assert not re.search(r"all-gather|all-to-all|all-reduce|collective-permute", program.as_text())
    tiles = program({name: jax.device_put(x, shardings[name]) for name, x in params.items()})
    joined = jax.jit(join, out_shardings=shardings)(tiles)
    coordinates = {device: dict(zip(MESH, at, strict=True)) for at, device in np.ndenumerate(mesh.devices)}
    for name, tiling in tilings.items():
        np.testing.assert_array_equal(joined[name], params[name], err_msg=name)
        expected = numpy_blocks.tiles(params[name], tiling)
        held = shardings[name].devices_indices_map(params[name].shape)
        padding = tiling.slice * tiling.copies - math.prod(tiling.tile)
        flat = np.pad(expected.reshape(*expected.shape[:2], -1), [(0, 0), (0, 0), (0, padding)])
        np.testing.assert_array_equal(np.asarray(tiles[name]).reshape(flat.shape), flat, err_msg=name)
        for shard in tiles[name].addressable_shards:
            at, copy = tiling.position_of(coordinates[shard.device])
            part = flat[at].reshape(flat.shape[1], tiling.copies, -1)[:, copy]
            np.testing.assert_array_equal(np.asarray(shard.data).reshape(part.shape), part, err_msg=name)
            if fits:
                assert set(part[part > 0]) <= set(params[name][held[shard.device]].reshape(-1)), name


@pytest.mark.parametrize(
    ("shape", "words"),
    [((24, 40), ""), ((5, 4, 6), ""), ((5, 4, 6), "stack=1"), ((5, 4, 18), "view=tensor"), ((3, 1, 20), "view=tensor")],
)
def test_one_device_needs_no_mesh(shape, words):
    """Faults: on one device, tiles are not the blocks; padding is not zero."""
    tiling = tiling_of(shape, None, P(), words, mesh={})
    assert tiling.tile == tiling.block
    x = numpy_blocks.numbered(shape)
    tiles = to_tiles(x, tiling, None)
    blocks = numpy_blocks.cut(x, tiling.view, tiling.pieces, tiling.block)
    np.testing.assert_array_equal(tiles, blocks.reshape(len(blocks), -1))
    np.testing.assert_array_equal(from_tiles(tiles, tiling, None), x)


@st.composite
def layouts(draw):
    """Draw (shape, axis names, spec, treatment, mesh, block size). The spec divides the shape."""
    mesh = {"x": draw(st.integers(1, 3)), "y": draw(st.integers(2, 4)), "z": 2}
    free = draw(st.permutations(list(mesh)))
    rank = draw(st.integers(2, 4))
    orders = [FOLDED, FOLDED[::-1], (*FOLDED[1:], FOLDED[0])]
    names = draw(st.sampled_from([None, *[("layers", *order) for order in orders]]))
    shape, spec = [], []
    for _ in range(rank):
        used = [free.pop() for _ in range(min(len(free), draw(st.sampled_from([0, 0, 1, 1, 2]))))]
        shape.append(math.prod(mesh[name] for name in used) * draw(st.sampled_from([1, 2, 3, 4, 8, 11, 12])))
        spec.append(tuple(used) or None)
    words = draw(st.sampled_from(["", "view=tensor", *([] if names else ["stack=1"])]))
    return (
        tuple(shape),
        names and names[-rank:],
        P(*spec),
        words,
        mesh,
        draw(st.sampled_from([4, 8, 12, 16, 24, 64, 72])),
    )


@settings(deadline=None, max_examples=120)
@given(layout=layouts())
def test_positions_of_tiles(layout):
    """Faults: a tile is assigned to another block or position than its elements; an element is in no tile or in two;
    the holder of a block is wrong."""
    tiling = tiling_of(*layout)
    assume(tiling is not None)
    x = numpy_blocks.numbered(layout[0])
    blocks = numpy_blocks.cut(x, tiling.view, tiling.pieces, tiling.block)
    tiles = numpy_blocks.tiles(x, tiling)
    assert sorted(tiles[tiles > 0]) == list(x.reshape(-1))
    block, place = tiling.places
    assert block.shape == place.shape == tiles.shape[:2]
    assert (np.multiply(tiling.per_block, tiling.tile) <= tiling.block).all()
    for shard, tile in np.ndindex(*block.shape):
        at = np.unravel_index(place[shard, tile], tiling.per_block)
        region = tuple(slice(i * n, (i + 1) * n) for i, n in zip(at, tiling.tile, strict=True))
        np.testing.assert_array_equal(blocks[block[shard, tile]][region], tiles[shard, tile])
    for number, shard in enumerate(tiling.holder):
        assert shard == np.flatnonzero((block == number).any(axis=1))[0]


def longest_tile(view, side, sharded, mesh, pieces, block):
    """Return (longest tile in one block and one shard, longest run of neighbours in a shard) along a side."""
    numbers = np.arange(view.length(side)).reshape([view.shape[axis] for axis in side])
    own = [(side.index(axis), names) for axis, names in sharded if axis in side]
    positions = [shard.reshape(-1) for shard in numpy_blocks.shards(numbers, own, mesh)]
    runs = [run for p in positions for run in np.split(p, np.flatnonzero(np.diff(p) != 1) + 1)]
    longest = 0
    for length in range(1, len(positions[0]) + 1):
        if len(positions[0]) % length == 0 and (pieces == 1 or block % length == 0):
            rows = np.concatenate(positions).reshape(-1, length)
            if (np.diff(rows, axis=1) == 1).all() and (rows[:, 0] % length == 0).all():
                longest = length
    return longest, max(map(len, runs))


@settings(deadline=None, max_examples=120)
@given(layout=layouts())
def test_tiles_have_the_largest_length(layout):
    """Faults: tiles are shorter than shards and blocks allow; a side stays sharded although its tiles are too short; a
    side is gathered although they are not."""
    _, _, spec, _, mesh, _ = layout
    tiling = tiling_of(*layout)
    assume(tiling is not None)
    wanted = [(axis, tuple(name for name in names or () if mesh[name] > 1)) for axis, names in enumerate(spec)]
    wanted = [(axis, names) for axis, names in wanted if names]
    kept = [(axis, names) for axis, names in wanted if axis in tiling.view.stack]
    for side, tile, pieces, block in zip(tiling.view.sides, tiling.tile, tiling.pieces, tiling.block, strict=True):
        own = [(axis, names) for axis, names in wanted if axis in side]
        longest, run = longest_tile(tiling.view, side, wanted, mesh, pieces, block)
        if own and longest >= min(SMALLEST_TILE, run):
            kept += own
            assert tile == longest
        else:
            assert tile == block
    assert dict(tiling.sharded) == dict(kept) and list(tiling.sharded) == sorted(kept)
    assert tiling.copies * math.prod(tiling.parts.values()) == math.prod(mesh.values())


def test_axes_that_the_mesh_does_not_divide_are_gathered():
    """Fault: a shard has 12.5 rows."""
    assert tiling_of((25, 64), None, P("x", "y"), block_size=32).sharded == ((1, ("y",)),)
    assert tiling_of((25, 64), None, P("x", None), block_size=32).sharded == ()
