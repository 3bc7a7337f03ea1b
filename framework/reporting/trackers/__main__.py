"""The process of one tracker: pass measurements from standard input on to it, until the run ends or dies."""

import importlib
import json
import os
import sys
import threading
import time

from .tracker import HAS_WARNED, TrackedRun, warning

_LAST_SECONDS = 60.0  # after the process of the run has ended


def main() -> int:
    """Track until the end of the input, and return the exit code."""
    threading.Thread(target=_end_after, args=(os.getppid(),), daemon=True).start()
    first = json.loads(sys.stdin.readline())
    module, _, tracker = first["name"].partition(":")
    complete = False
    try:
        session = getattr(importlib.import_module(module), tracker)(**first["options"]).open(TrackedRun(**first["run"]))
        for line in sys.stdin:
            message = json.loads(line)
            if "values" in message:
                session.scalars(message["step"], message["values"])
            elif "texts" in message:
                session.texts(message["step"], message["texts"])
            complete = message.get("complete", complete)
        session.close(complete)
    except (Exception, SystemExit) as error:  # the package of a tracker may raise anything
        why = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError):
            why += f". Install it: pip install {first['tracker']}"
        print(warning(first["tracker"], why), flush=True)
        return HAS_WARNED
    return 0


def _end_after(run: int) -> None:
    """End this process, should it hang, after the process of the run."""
    while os.getppid() == run:
        time.sleep(1.0)
    time.sleep(_LAST_SECONDS)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())
