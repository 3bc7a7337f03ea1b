"""Who owns which block: an assignment that is level for memory, for traffic and for every step's refreshes at once.

Blocks are the edges of a bipartite graph, owners are colours. On the left a block meets those of its bucket that the
same devices hold, on the right those that are due in the same phase. Each side cuts its blocks into chunks of at most
as many blocks as there are owners; a proper edge colouring (Koenig 1916: as many colours as the largest chunk has
blocks are enough) gives every chunk different owners, so that each owner has its share of every chunk, rounded up or
down.
"""

from collections.abc import Sequence

import numpy as np


def assign_owners(bucket: np.ndarray, holder: np.ndarray, phase: np.ndarray, owners: int) -> np.ndarray:
    """The owner of each block.

    Of every bucket, and of all that is due in a phase, each owner has floor(n / owners) or ceil(n / owners) blocks; of
    what one holder has of a bucket at most two more than floor(n / owners), and exactly its share where all holders'
    counts are multiples of `owners`.

    Args:
      bucket: [blocks] int, the bucket of each block.
      holder: [blocks] int, a number for the devices that hold the tiles of each block's parameter.
      phase: [blocks] int, the phase in which each block is due.
      owners: number of owners.

    Returns:
      [blocks] int.
    """
    if owners == 1:
        return np.zeros(len(bucket), np.int64)
    left = _chunks(bucket, holder, owners)
    right = _chunks(phase, bucket, owners)
    return _edge_colouring(left.tolist(), right.tolist(), owners)


def _chunks(outer: np.ndarray, inner: np.ndarray, size: int) -> np.ndarray:
    """Number of each element's chunk: runs of at most `size` in the order (outer, inner); none spans two outers."""
    order = np.lexsort((np.arange(len(outer)), inner, outer))
    _, first, counts = np.unique(outer[order], return_index=True, return_counts=True)
    rank = np.arange(len(outer)) - np.repeat(first, counts)
    chunks_before = np.repeat(np.cumsum(-(-counts // size)) - (-(-counts // size)), counts)
    result = np.empty(len(outer), np.int64)
    result[order] = chunks_before + rank // size
    return result


def _edge_colouring(left: Sequence[int], right: Sequence[int], colours: int) -> np.ndarray:
    """Colours of edges, different at every vertex; no vertex has more edges than there are colours.

    An edge takes a colour that is free at both its ends. Where there is none, let a be free on the left and b on the
    right: exchanging a and b along the path that leaves the right end with colour a frees a there, and never reaches
    the left end.
    """
    colour = np.full(len(left), -1, np.int64)
    edge_at_left = [[-1] * colours for _ in range(max(left, default=-1) + 1)]
    edge_at_right = [[-1] * colours for _ in range(max(right, default=-1) + 1)]
    start = 0
    for edge, (u, v) in enumerate(zip(left, right, strict=True)):
        at_u, at_v = edge_at_left[u], edge_at_right[v]
        # Begin at another colour each time: vertices with few edges then do not all choose the first colours.
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
