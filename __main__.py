"""`python -m shampax VERB ...` is the command `shampax`."""

import sys

from .launch.main import main

if __name__ == "__main__":
    sys.exit(main())
