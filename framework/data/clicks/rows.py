"""Rows of clicks: their bytes in a shard, and their examples."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

INTEGERS, CATEGORIES = 13, 26
MISSING = -(2**31)  # an empty integer field; an empty category is 0
ROW = np.dtype([("label", "u1"), ("integers", "<i4", INTEGERS), ("categories", "<u4", CATEGORIES)])

Fields = tuple[int, Sequence[int | None], Sequence[int]]  # label, integers, 32-bit hashes of categories


def spec() -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and types of an example.

    label: 1 for a click. weight: 1; padding examples have 0. integers: counts, which may be negative; `MISSING` for an
    empty field. categories: 32-bit hashes, which a model maps to the rows of its tables.
    """
    return {
        "label": jax.ShapeDtypeStruct((), np.int32),
        "weight": jax.ShapeDtypeStruct((), np.float32),
        "integers": jax.ShapeDtypeStruct((INTEGERS,), np.int32),
        "categories": jax.ShapeDtypeStruct((CATEGORIES,), np.uint32),
    }


def packed(fields: Fields) -> bytes:
    """Return the bytes of a row; integers are clipped to 32 bits."""
    label, integers, categories = fields
    row = np.empty((), ROW)
    row["label"] = label
    row["integers"] = [MISSING if x is None else min(max(x, MISSING + 1), 2**31 - 1) for x in integers]
    row["categories"] = categories
    return row.tobytes()


def unpacked(content: bytes) -> dict[str, np.ndarray]:
    """Return the example of the bytes of a row."""
    return example(np.frombuffer(content, ROW)[0])


def example(row: Any) -> dict[str, np.ndarray]:
    """Return the example of a row with the fields of `ROW`."""
    return {
        "label": np.asarray(row["label"], np.int32),
        "weight": np.ones((), np.float32),
        "integers": row["integers"].astype(np.int32),
        "categories": row["categories"].astype(np.uint32),
    }
