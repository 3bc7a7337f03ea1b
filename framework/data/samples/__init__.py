"""The small real data sets that ship inside the package; LICENSES.md says what they are and whose."""

import hashlib
import lzma
import re
from importlib import resources

from ...base.errors import UserError


def sha256(file: str) -> str:
    """Hash of a sample's uncompressed bytes, as LICENSES.md has it.

    Args:
      file: its name, "enwiki-106.txt.xz".
    """
    names, hashes = next(row for row in _rows() if file in row[0])
    return hashes[names.index(file)]


def read(file: str) -> bytes:
    """The uncompressed bytes of a sample.

    Raises:
      UserError: they are not those that LICENSES.md speaks of.
    """
    content = lzma.decompress(resources.files(__name__).joinpath(file).read_bytes())
    digest, expected = hashlib.sha256(content).hexdigest(), sha256(file)
    if digest != expected:
        raise UserError(f"{file} has sha256 {digest}, LICENSES.md says {expected}; install shampax again")
    return content


def _rows() -> list[tuple[list[str], list[str]]]:
    """File names and hashes of each row of the table; a row may have several of both."""
    lines = resources.files(__name__).joinpath("LICENSES.md").read_text().splitlines()
    return [
        (re.findall(r"`([^`]+)`", line.split("|")[1]), re.findall(r"\b[0-9a-f]{64}\b", line))
        for line in lines
        if line.startswith("| `")
    ]
