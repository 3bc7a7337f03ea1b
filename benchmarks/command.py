"""What every benchmark's command line does with a result and with what goes wrong."""

import json
import sys
from collections.abc import Callable
from typing import Any

from ..framework.base.errors import UserError


def report(run: Callable[[], Any]) -> int:
    """Print what `run` returns as JSON; returns the exit code: 2 after one line for the user, 130 when stopped."""
    try:
        result = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    return 0
