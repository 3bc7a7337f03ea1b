"""Assign blocks to owners, balancing memory, traffic and the refreshes of every step.

Blocks are the edges of a bipartite graph, owners are colours. A left vertex is a chunk of at most `owners` blocks of
the same bucket and, as far as possible, the same holder. A right vertex is such a chunk of blocks due in the same
phase. A proper edge colouring (Koenig 1916: `owners` colours are enough) gives the blocks of a chunk different owners.
"""

from collections.abc import Sequence

import numpy as np


def assign_owners(bucket: np.ndarray, holder: np.ndarray, phase: np.ndarray, owners: int) -> np.ndarray:
    """Return the owner of each block, [blocks] int.

    Of the n blocks of a bucket, and of the n blocks due in a phase, each owner has floor(n / owners) or
    ceil(n / owners). Of the n blocks of a bucket with the same holder, it has at most floor(n / owners) + 2, or exactly
    n / owners if the counts of all holders are multiples of `owners`.

    Args:
      bucket: [blocks] int, bucket of each block.
      holder: [blocks] int, id of the devices that hold each block's shard.
      phase: [blocks] int, phase in which each block is due.
      owners: number of owners.
    """
    if owners == 1:
        return np.zeros(len(bucket), np.int64)
    left = _chunks(bucket, holder, owners)
    right = _chunks(phase, bucket, owners)
    return _edge_colouring(left.tolist(), right.tolist(), owners)


def _chunks(outer: np.ndarray, inner: np.ndarray, size: int) -> np.ndarray:
    """Return each element's chunk: at most `size` elements with the same `outer`, in the order (outer, inner)."""
    order = np.lexsort((np.arange(len(outer)), inner, outer))
    _, first, counts = np.unique(outer[order], return_index=True, return_counts=True)
    rank = np.arange(len(outer)) - np.repeat(first, counts)
    chunks_before = np.repeat(np.cumsum(-(-counts // size)) - (-(-counts // size)), counts)
    result = np.empty(len(outer), np.int64)
    result[order] = chunks_before + rank // size
    return result


def _edge_colouring(left: Sequence[int], right: Sequence[int], colours: int) -> np.ndarray:
    """Return a colour per edge, different at every vertex. A vertex may have at most `colours` edges.

    An edge takes a colour that is free at both ends. If no colour is, let a be free on the left and b on the right.
    Swapping a and b along the path that leaves the right end with colour a frees a there. The path never reaches the
    left end.
    """
    colour = np.full(len(left), -1, np.int64)
    edge_at_left = [[-1] * colours for _ in range(max(left, default=-1) + 1)]
    edge_at_right = [[-1] * colours for _ in range(max(right, default=-1) + 1)]
    start = 0
    for edge, (u, v) in enumerate(zip(left, right, strict=True)):
        at_u, at_v = edge_at_left[u], edge_at_right[v]
        # Start at another colour each time, so that vertices with few edges do not all use the first colours.
        both = next(
            (c % colours for c in range(start, start + colours) if at_u[c % colours] == at_v[c % colours] == -1), -1
        )
        if both < 0:
            both, other = at_u.index(-1), at_v.index(-1)
            path, table, vertex, wanted = [], edge_at_right, v, both
            while (following := table[vertex][wanted]) >= 0:
                path.append(following)
                table, vertex = (
                    (edge_at_left, left[following]) if table is edge_at_right else (edge_at_right, right[following])
                )
                wanted = other if wanted == both else both
            for step in path:
                for table, vertex in ((edge_at_left, left[step]), (edge_at_right, right[step])):
                    table[vertex][colour[step]] = -1
            for step in path:
                colour[step] = other if colour[step] == both else both
                edge_at_left[left[step]][colour[step]] = edge_at_right[right[step]][colour[step]] = step
        colour[edge] = both
        at_u[both] = at_v[both] = edge
        start = both + 1
    return colour
