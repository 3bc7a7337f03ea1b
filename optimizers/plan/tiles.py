"""Cut sharded parameters into tiles, and join tiles.

Blocks rarely coincide with shards. A tile is a rectangle that is within one block and one shard. Devices that hold
copies of a shard divide each of its tiles evenly. Cutting needs no communication; only the exchange of tiles with the
blocks' owners does.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .views import View

SMALLEST_TILE = 8


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of one parameter.

    Attributes:
      view: view of the parameter as a stack of tensors.
      pieces: number of blocks along each side.
      block: lengths of a block with padding.
      sharded: (axis of the parameter, mesh axes that shard it), in the order of the axes.
      free: other mesh axes, which divide each tile.
      mesh: axis name -> number of devices.
      tile: lengths of a tile.
    """

    view: View
    pieces: tuple[int, ...]
    block: tuple[int, ...]
    sharded: tuple[tuple[int, tuple[str, ...]], ...]
    free: tuple[str, ...]
    mesh: Mapping[str, int]
    tile: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Return the number of blocks, which are numbered row-major over stack x pieces of the sides."""
        return self.view.stacked * math.prod(self.pieces)

    @functools.cached_property
    def parts(self) -> dict[int, int]:
        """Return axis of the parameter -> number of shards along it."""
        return {axis: math.prod(self.mesh[name] for name in names) for axis, names in self.sharded}

    @functools.cached_property
    def local(self) -> tuple[int, ...]:
        """Return the shape of a shard of the parameter."""
        return tuple(size // self.parts.get(axis, 1) for axis, size in enumerate(self.view.shape))

    @property
    def copies(self) -> int:
        """Return the number of devices that hold each shard."""
        return math.prod(self.mesh[name] for name in self.free)

    @property
    def slice(self) -> int:
        """Return the number of elements of a tile that one device holds, with padding."""
        return math.ceil(math.prod(self.tile) / self.copies)

    @functools.cached_property
    def per_block(self) -> tuple[int, ...]:
        """Return the number of tiles of a block along each side; a remainder that is not a whole tile is padding."""
        return tuple(
            block // tile if block % tile == 0 else length // tile
            for block, tile, length in zip(self.block, self.tile, self.view.lengths, strict=True)
        )

    def shards_of(self, axes: Sequence[int]) -> list[int]:
        """Return the sharded axes among `axes`."""
        return [axis for axis in axes if axis in self.parts]

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (block of each tile, its index among the tiles of the block), each [shards, tiles].

        Shards and the tiles of a shard are numbered row-major, as in the result of `to_tiles`.
        """
        groups = [_positions(self.view.shape, self.view.stack, self.parts)]
        for side, tile, pieces, block in zip(self.view.sides, self.tile, self.pieces, self.block, strict=True):
            positions = _positions(self.view.shape, side, self.parts)
            if not self.shards_of(side):
                positions = np.arange(pieces * block)[None]
            groups.append(positions[:, ::tile])
        # A shard is an index along each sharded axis; a group has positions only for its own axes.
        counts = [self.parts[axis] for axis, _ in self.sharded]
        grid = np.indices(counts).reshape(len(counts), math.prod(counts))
        index_of = {axis: grid[i] for i, (axis, _) in enumerate(self.sharded)}
        block_number = place = np.zeros((math.prod(counts), *[1] * len(groups)), np.int64)
        for i, (axes, positions) in enumerate(zip((self.view.stack, *self.view.sides), groups, strict=True)):
            shard = np.zeros(block_number.shape[0], np.int64)
            for axis in self.shards_of(axes):
                shard = shard * self.parts[axis] + index_of[axis]
            at = positions[shard].reshape(len(shard), *[-1 if i == j else 1 for j in range(len(groups))])
            if i == 0:
                block_number = block_number + at
            else:
                block, tile = self.block[i - 1], self.tile[i - 1]
                block_number = block_number * self.pieces[i - 1] + at // block
                place = place * self.per_block[i - 1] + at % block // tile
        tiles = np.broadcast_shapes(block_number.shape, place.shape)
        return tuple(np.broadcast_to(x, tiles).reshape(tiles[0], -1) for x in (block_number, place))  # type: ignore

    @functools.cached_property
    def holder(self) -> np.ndarray:
        """Return [blocks] int, the first shard that has a tile of each block."""
        block, _ = self.places
        holder = np.full(self.blocks, len(block))
        for shard in reversed(range(len(block))):
            holder[block[shard]] = shard
        return holder

    def position_of(self, coordinates: Mapping[str, int]) -> tuple[int, int]:
        """Return (shard, copy) of the device at the given mesh coordinates."""
        shard = copy = 0
        for _, names in self.sharded:
            for name in names:
                shard = shard * self.mesh[name] + coordinates[name]
        for name in self.free:
            copy = copy * self.mesh[name] + coordinates[name]
        return shard, copy

    def spec(self, free: Sequence[str]) -> PartitionSpec:
        """Return the spec of the result of `to_tiles` with the elements of each tile divided over the axes `free`."""
        return PartitionSpec(*[names for _, names in self.sharded], None, tuple(free) or None)


def make_tiling(
    view: View, pieces: Sequence[int], block: Sequence[int], spec: PartitionSpec | None, mesh: Mapping[str, int]
) -> Tiling:
    """Return the tiling of a parameter with the sharding `spec`.

    A side whose tiles would be shorter than SMALLEST_TILE is treated as not sharded, and so is an axis that is not
    divisible by its mesh axes. The partitioner then gathers it first.
    """
    sharded = []
    for axis, names in enumerate(spec or ()):
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        names = tuple(name for name in names if mesh[name] > 1)
        if names and view.shape[axis] % math.prod(mesh[name] for name in names) == 0:
            sharded.append((axis, names))
    tile = []
    for side, count, length in zip(view.sides, pieces, block, strict=True):
        parts = {axis: math.prod(mesh[name] for name in names) for axis, names in sharded if axis in side}
        tile.append(_tile_length(view, side, parts, count, length))
        if tile[-1] == 0:
            sharded = [(axis, names) for axis, names in sharded if axis not in side]
            tile[-1] = length
    used = {name for _, names in sharded for name in names}
    free = tuple(name for name in mesh if name not in used and mesh[name] > 1)
    return Tiling(view, tuple(pieces), tuple(block), tuple(sharded), free, mesh, tuple(tile))


def _positions(shape: Sequence[int], axes: Sequence[int], parts: Mapping[int, int]) -> np.ndarray:
    """Return [shards, elements of a shard], the positions of each shard's elements along the folded axes."""
    split, order_shards, order_local = [], [], []
    for axis in axes:
        if axis in parts:
            order_shards.append(len(split))
            split.append(parts[axis])
        order_local.append(len(split))
        split.append(shape[axis] // parts.get(axis, 1))
    positions = np.arange(math.prod(split)).reshape(split).transpose(order_shards + order_local)
    return positions.reshape(math.prod(split[i] for i in order_shards), -1)


def _tile_length(view: View, side: Sequence[int], parts: Mapping[int, int], pieces: int, block: int) -> int:
    """Return the longest tile length that divides both shards and blocks, or 0 if it is too short."""
    if not parts:
        return block
    length = block if pieces > 1 else 0
    run = 0
    for positions in _positions(view.shape, side, parts):
        starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)
        lengths = np.diff(starts, append=len(positions))
        run = max(run, int(lengths.max()))
        length = int(np.gcd.reduce([*positions[starts], *lengths, length]))
    return length if length >= min(SMALLEST_TILE, run) else 0


def to_tiles(x: jax.Array, tiling: Tiling, mesh: Mesh | None) -> jax.Array:
    """Return the tiles of a parameter-shaped array in float32, zero in the padding.

    Returns:
      [shards along each sharded axis..., tiles of a shard, elements of a tile], with the number of elements rounded up
      to a multiple of the copies.
    """
    lead, stack, lengths, whole, counts = _shard(tiling)
    fixed, axes = len(lead) + 1, range(len(tiling.view.shape))
    x = x.astype(jnp.float32).reshape(
        [size for axis in axes for size in (tiling.parts.get(axis, 1), tiling.local[axis])]
    )
    x = x.transpose([*[2 * axis for axis in axes], *[2 * axis + 1 for axis in tiling.view.axes]])
    x = _pin(x.reshape(*lead, stack, *lengths), tiling, mesh, len(lengths) + 1)
    x = jnp.pad(x, [(0, 0)] * fixed + [(0, w - length) for w, length in zip(whole, lengths, strict=True)])
    grid = [size for pair in zip(counts, tiling.tile, strict=True) for size in pair]
    x = x.reshape(*lead, stack, *grid)
    sides = range(len(lengths))
    x = x.transpose(*range(fixed), *[fixed + 2 * i for i in sides], *[fixed + 2 * i + 1 for i in sides])
    elements = math.prod(tiling.tile)
    x = x.reshape(*lead, stack * math.prod(counts), elements)
    return jnp.pad(x, [(0, 0)] * fixed + [(0, tiling.slice * tiling.copies - elements)])


def from_tiles(tiles: jax.Array, tiling: Tiling, mesh: Mesh | None) -> jax.Array:
    """Invert `to_tiles`."""
    lead, stack, lengths, whole, counts = _shard(tiling)
    axes = tiling.view.axes
    fixed, sides = len(lead) + 1, range(len(lengths))
    x = tiles[..., : math.prod(tiling.tile)].reshape(*lead, stack, *counts, *tiling.tile)
    x = x.transpose(*range(fixed), *[fixed + i + offset for i in sides for offset in (0, len(lengths))])
    x = x.reshape(*lead, stack, *whole)[(..., *[slice(length) for length in lengths])]
    x = _pin(x, tiling, mesh, len(lengths) + 1)
    x = x.reshape([tiling.parts.get(axis, 1) for axis in range(len(axes))] + [tiling.local[axis] for axis in axes])
    order = [i for axis in range(len(axes)) for i in (axis, len(axes) + axes.index(axis))]
    return x.transpose(order).reshape(tiling.view.shape)


def _shard(tiling: Tiling) -> tuple[list[int], int, list[int], list[int], list[int]]:
    """Return (shards along sharded axes; a shard's stack, its sides without and with padding, tiles of each)."""
    view, lead = tiling.view, [tiling.parts[axis] for axis, _ in tiling.sharded]
    stack, *lengths = (math.prod(tiling.local[axis] for axis in axes) for axes in (view.stack, *view.sides))
    whole = [
        length if tiling.shards_of(side) else pieces * block
        for side, length, pieces, block in zip(view.sides, lengths, tiling.pieces, tiling.block, strict=True)
    ]
    return lead, stack, lengths, whole, [w // tile for w, tile in zip(whole, tiling.tile, strict=True)]


def _pin(x: jax.Array, tiling: Tiling, mesh: Mesh | None, rest: int) -> jax.Array:
    """Constrain the sharding between reshapes, so that the partitioner does not choose another."""
    if mesh is None:
        return x
    spec = PartitionSpec(*[names for _, names in tiling.sharded], *[None] * rest)
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def slice_tiles(tiles: jax.Array, tiling: Tiling, mesh: Mesh) -> jax.Array:
    """Divide each tile over the devices that hold copies of it.

    Mesh axes are applied one by one, so that a pending all-reduce of gradients becomes a reduce-scatter even on
    interconnects that support it along single axes only.
    """
    # Padded tiles are first kept whole: dividing before padding would shift elements between devices.
    padded = tiling.slice * tiling.copies > math.prod(tiling.tile)
    for count in range(0 if padded else 1, len(tiling.free) + 1):
        tiles = lax.with_sharding_constraint(tiles, NamedSharding(mesh, tiling.spec(tiling.free[:count])))
    return tiles
