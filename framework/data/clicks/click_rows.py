"""Clicks as rows of a fixed size: how they lie in a shard, and the examples that they stand for."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

INTEGERS, CATEGORIES = 13, 26
# Stands for an empty field among the integers. An empty category is 0, like any category whose hash that is.
MISSING = -(2**31)
ROW = np.dtype([("label", "u1"), ("integers", "<i4", INTEGERS), ("categories", "<u4", CATEGORIES)])

Fields = tuple[int, Sequence[int | None], Sequence[int]]


def spec() -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of an example.

    label: 1 for a click. weight: 1, so that examples of zeros have none. integers: counts, which may be negative;
    `MISSING` where the field was empty. categories: 32-bit hashes, which a model maps to the rows of its tables.
    """
    return {
        "label": jax.ShapeDtypeStruct((), np.int32),
        "weight": jax.ShapeDtypeStruct((), np.float32),
        "integers": jax.ShapeDtypeStruct((INTEGERS,), np.int32),
        "categories": jax.ShapeDtypeStruct((CATEGORIES,), np.uint32),
    }


def packed(fields: Fields) -> bytes:
    """A row of (label, integers or None, hashes of categories); integers beyond 32 bits become the nearest within."""
    label, integers, categories = fields
    row = np.empty((), ROW)
    row["label"] = label
    row["integers"] = [MISSING if x is None else min(max(x, MISSING + 1), 2**31 - 1) for x in integers]
    row["categories"] = categories
    return row.tobytes()


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """The example of a row of `packed`."""
    return example(np.frombuffer(content, ROW)[0])


def example(row: Any) -> dict[str, np.ndarray]:
    """The example that a row, one element of type `ROW`, holds."""
    return {
        "label": np.asarray(row["label"], np.int32),
        "weight": np.ones((), np.float32),
        "integers": row["integers"].astype(np.int32),
        "categories": row["categories"].astype(np.uint32),
    }
