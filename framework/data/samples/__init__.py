"""The small real data sets that ship inside the package; LICENSES.md describes them and their licences."""

import functools
import hashlib
import lzma
from importlib import resources


@functools.cache
def sha256(file: str) -> str:
    """Return the hash of a sample's uncompressed bytes, by the name of its file."""
    return hashlib.sha256(read(file)).hexdigest()


@functools.lru_cache(2)  # a start reads a sample eight times, 0.04 s each
def read(file: str) -> bytes:
    """Return the uncompressed bytes of a sample."""
    return lzma.decompress(resources.files(__name__).joinpath(file).read_bytes())
