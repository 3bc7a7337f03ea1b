import subprocess
import sys

import shampax


def test_public_names_and_nothing_imported_before_they_are_asked_for():
    """Catches a front door that starts JAX before a launcher could set its environment, or that misses a name."""
    code = "import sys, shampax; assert 'jax' not in sys.modules; shampax.ShampooOptions; assert 'jax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(shampax.distributed_shampoo)
    assert callable(shampax.train)
