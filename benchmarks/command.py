"""Print the result of a benchmark, or its error in one line."""

import json
import sys
from collections.abc import Callable
from typing import Any

from ..framework.base.errors import UserError


def report(run: Callable[[], Any]) -> int:
    """Print the result of `run` as JSON. Return the exit code: 0, 2 after a UserError, 130 after an interrupt."""
    try:
        result = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130
    print(json.dumps(result, indent=2))
    return 0
