"""The small real data sets that ship inside the package; LICENSES.md describes them and their licences."""

import hashlib
import lzma
from importlib import resources

from ...base.errors import UserError

# Of the uncompressed bytes, as in LICENSES.md.
_SHA256 = {
    "enwiki-106.txt.xz": "783a881865d838c322ee8d324e44f2010664e1525566b695add7bd9ef5367930",
    "web-lsg-nt.en-fr.tsv.xz": "059f10fecedcaadb6fe964316c33b8e53e9648c09b998b742ff4966c0c7e1527",
    "nycflights-30000.tsv.xz": "e1d871896e7be30b3498860d3b43361557a19264ce928a6262d64ce2d269d212",
    "fashion-mnist-train-2000.u8.xz": "da56975af04bce67ac54da23e11bd3a776f45dd3dffe2aeb0a56c52e6a6bacd0",
    "fashion-mnist-test-500.u8.xz": "862bbe4287c5637dfeeb51e1a08941ae05de26d4e75483ff7b262b46d20587a7",
}


def sha256(file: str) -> str:
    """Return the hash of a sample's uncompressed bytes, by the name of its file."""
    return _SHA256[file]


def read(file: str) -> bytes:
    """Return the uncompressed bytes of a sample.

    Raises:
      UserError: they have another hash.
    """
    content = lzma.decompress(resources.files(__name__).joinpath(file).read_bytes())
    digest = hashlib.sha256(content).hexdigest()
    if digest != sha256(file):
        raise UserError(f"{file}: has sha256 {digest}, expected {sha256(file)}. Reinstall shampax.")
    return content
