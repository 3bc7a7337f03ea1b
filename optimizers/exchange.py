"""Move blocks between the parameters' shards and the blocks' owners, by one all-to-all each way per bucket.

Outside `shard_map`, parameters are cut into tiles, each on the devices that hold its shard and divided among them.
Inside, each device sorts its tiles by owner, an all-to-all sends them, and the owners assemble blocks from tiles. All
indices are static. (The automatic partitioner would need a permutation per block.)
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .plan.blocks import Bucket, Leaf
from .plan.tiles import from_tiles, slice_tiles, to_tiles

# Mesh axis that joins slices of accelerators, which a slower network connects. Each slice owns all blocks once, and no
# block moves between slices.
SLICE_AXIS = "slice"


@dataclasses.dataclass(frozen=True)
class Route:
    """Static indices to exchange the tiles of one shape in a bucket between their devices and the owners.

    A part is the share of a tile that one device holds.

    Attributes:
      leaves: positions among the bucket's leaves of the parameters with such tiles.
      tile, per_block: lengths of a tile, and number of tiles of a block along each side.
      copies: number of devices that divide each tile.
      elements: number of elements of a part.
      depth: largest number of parts that any device sends to any other.
      sent: [devices, devices x depth] int32, index of the part at each place of the message a device sends; its number
        of parts for an empty place.
      position: [devices, parts of a device] int32, inverse of `sent`: owner x depth + rank of each part.
      source: [devices, slots, tiles of a block, copies] int32, sender x depth + rank of each part of each owned block;
        devices x depth for padding.
      returned: [devices, devices x depth] int32, inverse of `source`: index of the part at each place of the message an
        owner returns; its number of parts for an empty place.
    """

    leaves: tuple[int, ...]
    tile: tuple[int, ...]
    per_block: tuple[int, ...]
    copies: int
    elements: int
    depth: int
    sent: np.ndarray
    position: np.ndarray
    source: np.ndarray
    returned: np.ndarray


class Owners:
    """The devices of a mesh as owners of blocks; without a mesh, one device owns all blocks.

    Args:
      mesh: mesh whose devices, in row-major order, are the owners, those of each slice alike; or None.
    """

    def __init__(self, mesh: Mesh | None):
        self.mesh = mesh
        self.sizes = {name: size for name, size in mesh.shape.items() if name != SLICE_AXIS} if mesh is not None else {}
        self.axes = tuple(self.sizes)
        self.count = math.prod(self.sizes.values())

    def numbers(self) -> dict[Any, int]:
        """Return the number of each device of the mesh among the owners."""
        assert self.mesh is not None
        at = [name for name in self.mesh.axis_names if name != SLICE_AXIS]
        order = [*(name for name in self.mesh.axis_names if name == SLICE_AXIS), *at]
        devices = self.mesh.devices.transpose([self.mesh.axis_names.index(name) for name in order])
        return {device: i % self.count for i, device in enumerate(devices.flat)}

    def sharding(self, spec: PartitionSpec) -> NamedSharding:
        """Return a sharding over the owners' mesh."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, spec)

    @property
    def by_block(self) -> PartitionSpec:
        """Return the spec that shards axis 0 (the slots) over all devices of a slice."""
        return PartitionSpec(self.axes)

    def run(self, local: Callable[..., Any], tiles: Any, specs: Any, owned: Any, shared: Any) -> tuple[Any, Any, Any]:
        """Call `local(tiles, owned, shared)` under `shard_map`, on each device with its own shards.

        Args:
          local: returns (tiles, owned, shared), sharded like its arguments.
          tiles: tree of arrays returned by `cut`.
          specs: tree of PartitionSpecs shaped like `tiles`.
          owned: tree of arrays whose axis 0 is the slots or the devices.
          shared: tree of replicated arrays.
        """
        if self.mesh is None:
            return local(tiles, owned, shared)
        return jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(specs, self.by_block, PartitionSpec()),
            out_specs=(specs, self.by_block, PartitionSpec()),
            check_vma=False,  # eigh's scan carries change their varying axes and fail the check
        )(tiles, owned, shared)

    def cut(self, x: jax.Array, leaf: Leaf) -> jax.Array:
        """Return the tiles of a parameter-shaped array, each divided over the devices that hold its shard."""
        if self.mesh is None:
            return to_tiles(x, leaf.tiling, None)
        return slice_tiles(to_tiles(x, leaf.tiling, self.mesh), leaf.tiling, self.mesh)

    def join(self, tiles: jax.Array, leaf: Leaf) -> jax.Array:
        """Invert `cut`."""
        if self.mesh is not None:
            tiles = lax.with_sharding_constraint(tiles, self.sharding(leaf.tiling.spec(())))
        return from_tiles(tiles, leaf.tiling, self.mesh)

    def specs(self, bucket: Bucket) -> list[PartitionSpec]:
        """Return the specs of the tiles of a bucket's parameters."""
        return [leaf.tiling.spec(leaf.tiling.free) for leaf in bucket.leaves]

    def tables(self, bucket: Bucket) -> list[tuple[jax.Array, ...]]:
        """Return (sent, position, source, returned) of each route of a bucket, to pass to `run` in `owned`."""
        if self.mesh is None:
            return []
        routes = self._routes(bucket)
        return [tuple(map(jnp.asarray, (r.sent, r.position, r.source, r.returned))) for r in routes]

    def to_owners(self, tiles: Sequence[jax.Array], tables: Any, bucket: Bucket) -> jax.Array:
        """Send tiles to the owners inside `run`; return the owned blocks [slots per owner, *shape]."""
        if self.mesh is None:
            return jnp.concatenate([x.reshape(-1, *bucket.shape) for x in tiles])
        routes, outgoing = self._routes(bucket), []
        for route, (sent, _, _, _) in zip(routes, tables, strict=True):
            x = jnp.concatenate([tiles[i].reshape(-1, route.elements) for i in route.leaves])
            outgoing.append(x.at[sent[0]].get(mode="fill", fill_value=0).reshape(self.count, -1))
        blocks = jnp.zeros((), jnp.float32)
        for route, (_, _, source, _), x in zip(routes, tables, self._exchanged(outgoing, routes), strict=True):
            blocks += _assemble(x.at[source[0]].get(mode="fill", fill_value=0), route, bucket)
        return blocks

    def from_owners(self, blocks: jax.Array, tables: Any, bucket: Bucket) -> list[jax.Array]:
        """Send owned blocks back inside `run`; return tiles in the order of the bucket's leaves."""
        shapes = [_local_shape(leaf, self.mesh) for leaf in bucket.leaves]
        if self.mesh is None:
            parts = jnp.split(blocks, np.cumsum([leaf.tiling.blocks for leaf in bucket.leaves])[:-1])
            return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
        routes, outgoing = self._routes(bucket), []
        for route, (_, _, _, returned) in zip(routes, tables, strict=True):
            x = _disassemble(blocks, route)
            outgoing.append(x.at[returned[0]].get(mode="fill", fill_value=0).reshape(self.count, -1))
        result = [jnp.zeros(())] * len(bucket.leaves)
        for route, (_, position, _, _), x in zip(routes, tables, self._exchanged(outgoing, routes), strict=True):
            counts = [math.prod(shapes[i]) // route.elements for i in route.leaves]
            for i, part in zip(route.leaves, jnp.split(x[position[0]], np.cumsum(counts)[:-1]), strict=True):
                result[i] = part.reshape(shapes[i])
        return result

    def sum(self, x: jax.Array) -> jax.Array:
        """Return the sum over all owners of a slice inside `run`, replicated."""
        return lax.psum(x, self.axes) if self.mesh is not None else x

    def max(self, x: jax.Array) -> jax.Array:
        """Return the maximum over all owners of a slice inside `run`, replicated."""
        return lax.pmax(x, self.axes) if self.mesh is not None else x

    def of_first_slice(self, x: jax.Array) -> jax.Array:
        """Return the first slice's value of integers that should be equal on all slices, inside `run`."""
        if self.mesh is None or SLICE_AXIS not in self.mesh.axis_names:
            return x
        return lax.psum(jnp.where(lax.axis_index(SLICE_AXIS) == 0, x, 0), SLICE_AXIS)

    def _exchanged(self, outgoing: Sequence[jax.Array], routes: Sequence[Route]) -> list[jax.Array]:
        """Exchange messages [devices, ...] by one all-to-all; return the received parts of each route."""
        x = lax.all_to_all(jnp.concatenate(outgoing, axis=1), self.axes, split_axis=0, concat_axis=0, tiled=True)
        ends = np.cumsum([route.depth * route.elements for route in routes])[:-1]
        return [part.reshape(-1, route.elements) for part, route in zip(jnp.split(x, ends, 1), routes, strict=True)]

    def _routes(self, bucket: Bucket) -> tuple[Route, ...]:
        return _routes(bucket, tuple(self.sizes.items()))


def _assemble(parts: jax.Array, route: Route, bucket: Bucket) -> jax.Array:
    """Assemble parts [slots, tiles of a block, copies, elements] to blocks [slots, *shape]."""
    sides = range(len(route.tile))
    x = parts.reshape(*parts.shape[:2], -1)[:, :, : math.prod(route.tile)]
    x = x.reshape(-1, *route.per_block, *route.tile)
    x = x.transpose(0, *[1 + i + offset for i in sides for offset in (0, len(route.tile))])
    x = x.reshape(-1, *[count * tile for count, tile in zip(route.per_block, route.tile, strict=True)])
    return jnp.pad(x, [(0, 0), *[(0, whole - part) for whole, part in zip(bucket.shape, x.shape[1:], strict=True)]])


def _disassemble(blocks: jax.Array, route: Route) -> jax.Array:
    """Invert `_assemble`; return [parts, elements]."""
    sides = range(len(route.tile))
    pairs = list(zip(route.per_block, route.tile, strict=True))
    x = blocks[(slice(None), *[slice(count * tile) for count, tile in pairs])]
    x = x.reshape(-1, *[size for pair in pairs for size in pair])
    x = x.transpose(0, *[1 + 2 * i for i in sides], *[2 + 2 * i for i in sides])
    elements = math.prod(route.tile)
    x = x.reshape(-1, elements)
    x = jnp.pad(x, ((0, 0), (0, route.elements * route.copies - elements)))
    return x.reshape(-1, route.elements)


def _local_shape(leaf: Leaf, mesh: Mesh | None) -> tuple[int, ...]:
    """Return the shape of one device's shard of a parameter's tiles."""
    tiling = leaf.tiling
    if mesh is None:
        return (tiling.blocks, math.prod(tiling.tile))
    return (*[1] * len(tiling.sharded), tiling.places[0].shape[1], tiling.slice)


@functools.lru_cache(maxsize=256)
def _routes(bucket: Bucket, mesh: tuple[tuple[str, int], ...]) -> tuple[Route, ...]:
    """Return the routes of a bucket over a mesh given as (axis, number of devices) pairs."""
    by_shape: dict[Any, list[int]] = {}
    for i, leaf in enumerate(bucket.leaves):
        tiling = leaf.tiling
        by_shape.setdefault((tiling.tile, tiling.per_block, tiling.copies, tiling.slice), []).append(i)
    names, sizes = zip(*mesh, strict=True)
    coordinates = [dict(zip(names, at, strict=True)) for at in np.ndindex(*sizes)]
    owner, first = np.asarray(bucket.owner), np.cumsum([0, *[leaf.tiling.blocks for leaf in bucket.leaves]])
    slot = bucket.slot_of_block % bucket.slots.shape[1]
    result = []
    for (tile, per_block, copies, elements), members in by_shape.items():
        tilings = [bucket.leaves[i].tiling for i in members]
        held = [[tiling.position_of(at) for tiling in tilings] for at in coordinates]
        blocks, places, ranks = [], [], []
        for positions in held:
            at = [(tiling.places, shard) for tiling, (shard, _) in zip(tilings, positions, strict=True)]
            blocks.append(np.concatenate([first[i] + p[0][s] for i, (p, s) in zip(members, at, strict=True)]))
            places.append(np.concatenate([p[1][s] for p, s in at]))
            ranks.append(_rank(owner[blocks[-1]]))
        depth = 1 + max(int(rank.max()) for rank in ranks)
        position = np.stack([owner[b] * depth + rank for b, rank in zip(blocks, ranks, strict=True)])
        source = np.full((bucket.owners, bucket.slots.shape[1], math.prod(per_block), copies), bucket.owners * depth)
        for device, positions in enumerate(held):
            copy = np.concatenate(
                [np.full(tiling.places[0].shape[1], c) for tiling, (_, c) in zip(tilings, positions, strict=True)]
            )
            b = blocks[device]
            source[owner[b], slot[b], places[device], copy] = device * depth + ranks[device]
        places = bucket.owners * depth
        arrays = _inverse(position, places), position, source, _inverse(source.reshape(bucket.owners, -1), places)
        tables = [x.astype(np.int32) for x in arrays]
        result.append(Route(tuple(members), tile, per_block, copies, elements, depth, *tables))
    return tuple(result)


def _inverse(position: np.ndarray, places: int) -> np.ndarray:
    """Return [rows, places]: the index of each place in each row of `position`, or the row's length if absent."""
    rows, length = position.shape
    result = np.full((rows, places + 1), length)
    result[np.arange(rows)[:, None], position] = np.arange(length)
    return result[:, :places]


def _rank(x: np.ndarray) -> np.ndarray:
    """Return for each element the number of equal elements before it."""
    order = np.argsort(x, kind="stable")
    _, first, counts = np.unique(x[order], return_index=True, return_counts=True)
    rank = np.empty(len(x), np.int64)
    rank[order] = np.arange(len(x)) - np.repeat(first, counts)
    return rank
