import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import numpy_blocks
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from shampax.optimizers import ShampooOptions
from shampax.optimizers.exchange import Owners
from shampax.optimizers.plan.blocks import make_plan, parameters

# A bucket mixes parameters with different tiles: replicated, sharded along either side, a stack or a fold.
# name -> (shape, axis names, the mesh axes that divide each axis: the first, the last, or both, where 48 allows it)
PARAMETERS = {
    "replicated": ((72, 48), ("a", "b"), ()),
    "rows": ((48, 24), ("a", "b"), ("first",)),
    "columns": ((24, 48), ("a", "b"), ("", "last")),
    "rows by all": ((48, 48), ("a", "b"), ("all",)),
    "columns by all": ((24, 48), ("a", "b"), ("", "all")),
    "stack": ((6, 24, 24), ("layers", "a", "b"), ("first",)),
    "stack by last, rows": ((24, 24, 24), ("layers", "a", "b"), ("last", "rest")),
    "minor fold axis": ((24, 2, 24), ("embed", "heads", "head_dim"), ("", "", "first")),
    "conv": ((3, 2, 24, 8), (None, None, "in", "out"), ("", "", "first")),
    "other bucket": ((5, 7), ("a", "b"), ()),
    "uneven": ((24, 25), ("a", "b"), ("last",)),
    "one block with padding": ((24, 66), ("a", "b"), ("", "last")),
    "tensor": ((24, 6, 24), ("a", "b", "c"), ("first", "", "last")),
    "one side": ((24, 24), ("a", "b"), ("last",)),
}
RULES = (
    ("tensor", "shampoo view=tensor"),
    ("one side", "one_sided"),
    ("one block.*", "shampoo block_size=80"),
    (".*", "shampoo"),
)
MESHES = {
    0: {},
    1: {"x": 1},
    2: {"x": 2},
    3: {"x": 3},
    6: {"x": 3, "y": 2},
    8: {"x": 2, "y": 2, "z": 2},
}


def spec_of(words, mesh):
    """Return the PartitionSpec for these words. No mesh axis divides two axes."""
    names, used, entries = tuple(mesh), set(), []
    for word in words:
        axes = {"first": names[:1], "last": names[-1:], "all": names, "rest": names[:-1], "": ()}[word]
        entries.append(tuple(axis for axis in axes if axis not in used) or None)
        used |= set(axes)
    return P(*entries)


@functools.cache
def setting(count):
    """Return (mesh, parameters, their shardings, plan) for a number of devices; 0 has no mesh."""
    sizes = MESHES[count]
    mesh = Mesh(np.array(jax.devices()[:count]).reshape(tuple(sizes.values())), tuple(sizes)) if count else None
    shapes = {name: shape for name, (shape, *_) in PARAMETERS.items()}
    params = {name: numpy_blocks.numbered(shape, 20_000 * i + 1) for i, (name, shape) in enumerate(shapes.items())}
    names = {name: axes for name, (_, axes, _) in PARAMETERS.items()}
    specs = {name: spec_of(words, sizes) for name, (*_, words) in PARAMETERS.items()} if count else None
    plan = make_plan(parameters(params, names, specs), ShampooOptions(block_size=24, treatments=RULES), sizes)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()} if mesh else None
    return mesh, params, shardings, plan


def programs(mesh, plan):
    """Return (parameters -> bucket name -> owned blocks, inverse)."""
    owners = Owners(mesh)
    tables = {bucket.name: owners.tables(bucket) for bucket in plan.buckets}
    specs = {bucket.name: owners.specs(bucket) for bucket in plan.buckets}

    def there(params):
        leaves = jax.tree.leaves(params)
        tiles = {b.name: [owners.cut(leaves[leaf.index], leaf) for leaf in b.leaves] for b in plan.buckets}

        def local(tiles, tables, _):
            return tiles, {b.name: owners.to_owners(tiles[b.name], tables[b.name], b) for b in plan.buckets}, ()

        return owners.run(local, tiles, specs, tables, ())[1]

    def back(blocks):
        def local(_, owned, __):
            blocks, tables = owned
            return {b.name: owners.from_owners(blocks[b.name], tables[b.name], b) for b in plan.buckets}, owned, ()

        # The shardings of input tiles are free; those of output tiles are constrained.
        empty = {b.name: [jnp.zeros(tiles_shape(leaf)) for leaf in b.leaves] for b in plan.buckets}
        tiles, *_ = owners.run(local, empty, specs, (blocks, tables), ())
        return {
            leaf.path: owners.join(x, leaf)
            for bucket in plan.buckets
            for leaf, x in zip(bucket.leaves, tiles[bucket.name], strict=True)
        }

    return there, back


def tiles_shape(leaf):
    tiling = leaf.tiling
    shards = [tiling.parts[axis] for axis, _ in tiling.sharded]
    return (*shards, tiling.places[0].shape[1], tiling.slice * tiling.copies)


@pytest.mark.parametrize("count", [0, 6, 8, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))])
def test_blocks_reach_their_owners_and_return(count):
    """Faults: a tile reaches another owner, slot or position; padding is not zero; a parameter returns changed or with
    values of padding or empty slots; there is other traffic than one all-to-all per bucket and direction."""
    mesh, params, shardings, plan = setting(count)
    there, back = programs(mesh, plan)
    there = jax.jit(there, in_shardings=(shardings,) if mesh else None)
    blocks = there(params)
    assert set(blocks) == {bucket.name for bucket in plan.buckets}
    for bucket in plan.buckets:
        cut = [
            numpy_blocks.cut(params[leaf.path], leaf.view, leaf.tiling.pieces, leaf.tiling.block)
            for leaf in bucket.leaves
        ]
        expected = np.concatenate([*cut, np.zeros((1, *bucket.shape))])[bucket.slots.reshape(-1)]
        np.testing.assert_array_equal(blocks[bucket.name], expected, err_msg=bucket.name)
        if mesh is not None:
            held = [shard.data.shape[0] for shard in blocks[bucket.name].addressable_shards]
            assert held == [bucket.slots.shape[1]] * count
    littered = {name: np.where(x == 0, -1, x) for name, x in jax.device_get(blocks).items()}
    returned = jax.jit(back, out_shardings=shardings)(littered)
    assert set(returned) == set(params)
    for name, x in params.items():
        np.testing.assert_array_equal(returned[name], x, err_msg=name)


def test_buckets_mix_tilings():
    """Fault: the test above is too easy, because all parameters of a bucket have equal tiles."""
    for count in MESHES:
        *_, plan = setting(count)
        tilings = [{(leaf.tiling.tile, leaf.tiling.copies) for leaf in bucket.leaves} for bucket in plan.buckets]
        assert max(map(len, tilings)) >= (3 if count > 1 else 1)
        assert math.prod(MESHES[count].values()) == max(count, 1) == plan.buckets[0].owners


def test_traffic():
    """Fault: the partitioner moves blocks itself. There must be only one all-to-all per bucket from shards to
    owners."""
    mesh, params, shardings, plan = setting(8)
    there, _ = programs(mesh, plan)
    text = jax.jit(there, in_shardings=(shardings,)).lower(params).compile().as_text()
    kinds = "all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter"
    assert re.findall(rf" ({kinds})(?:-start)?\(", text) == ["all-to-all"] * len(plan.buckets)
