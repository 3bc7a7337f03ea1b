import subprocess
import sys

import shampax


def test_public_names_are_imported_on_first_use():
    """Faults: importing the package starts JAX before a launcher can set its environment; a public name is missing."""
    code = "import sys, shampax; assert 'jax' not in sys.modules; shampax.ShampooOptions; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(shampax.distributed_shampoo)
    assert callable(shampax.train)
