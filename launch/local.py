"""Run a command in several processes of this machine, as on a cluster.

    python -m shampax.launch.local [--processes=N] [--devices=M] [--max_restarts=N] [--grace_seconds=S] -- VERB ...

VERB is a module of shampax.launch, such as train, or the dotted name of any other module. Each process sees simulated
devices of its own, and all find each other over loopback: what is tried here runs there. Their lines appear with the
number of the process before them.

    python -m shampax.launch.local --processes=2 --devices=2 --max_restarts=3 -- \\
        train --config=shampax/configs/lm.py:sample --workdir=runs/two

When one fails, all end: the others get SIGTERM, and SIGKILL after the grace. Ctrl-C and SIGTERM are passed on to all,
who save and stop; a second one does not wait for longer than the grace. When this process is gone, so are they.

Exit codes: 0; 2, something given cannot work; else that of the first process that failed, 128 + N where signal N ended
it. With --max_restarts all are started again after a failure, unless its code is 2, which would only come again, or
they were asked to stop.
"""

import argparse
import importlib.util
import os
import pkgutil
import socket
import sys
from collections.abc import Sequence

from ..framework.base.errors import UserError, did_you_mean
from ..framework.distributed import cluster
from . import environment
from .gang import Gang

_PACKAGE = __package__ or ""
_REFUSED = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module. `arguments` are those of this process by default. Returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    divider = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:divider]), given[divider + 1 :]
    try:
        if not command:
            raise UserError("there is no command; write it after --, such as: -- train --config=... --workdir=...")
        module = _module(command[0])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _REFUSED
    restarts = 0
    with Gang([sys.executable, "-m", module, *command[1:]], grace_seconds=options.grace_seconds) as gang:
        while True:
            failure = gang.run(_environments(options.processes, options.devices))
            if failure is None:
                return 0
            _say(str(failure))
            if gang.asked or failure.code == _REFUSED or restarts == options.max_restarts:
                return failure.code
            restarts += 1
            _say(f"restart {restarts} of {options.max_restarts}")


def _environments(processes: int, devices: int) -> list[dict[str, str]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    shared = {
        **os.environ,
        **environment.simulating(devices),
        cluster.ADDRESS: address,
        cluster.COUNT: str(processes),
        "PYTHONUNBUFFERED": "1",  # lines when they are written, not when a buffer is full
    }
    return [{**shared, cluster.INDEX: str(index)} for index in range(processes)]


def _module(name: str) -> str:
    verbs = [module.name for module in pkgutil.iter_modules(sys.modules[_PACKAGE].__path__)]
    if name in verbs:
        return f"{_PACKAGE}.{name}"
    if "." not in name:
        raise UserError(
            f"{name!r} is neither a module of {_PACKAGE} nor the dotted name of another{did_you_mean(name, verbs)}"
        )
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise UserError(f"there is no module {top!r} in {os.getcwd()}, in PYTHONPATH, or installed")
    return name


def _say(text: str) -> None:
    print(f"local: {text}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m shampax.launch.local",
        usage="%(prog)s [--processes=N] [--devices=M] [--max_restarts=N] [--grace_seconds=S] -- VERB ...",
        description="Run a command in several processes of this machine, as on a cluster.",
        allow_abbrev=False,
    )
    parser.add_argument("--processes", type=_whole(1), default=2, metavar="N", help="how many (2)")
    parser.add_argument("--devices", type=_whole(1), default=1, metavar="M", help="simulated devices of each (1)")
    parser.add_argument(
        "--max_restarts", type=_whole(0), default=0, metavar="N", help="starts of all again after failures (0)"
    )
    parser.add_argument(
        "--grace_seconds",
        type=_whole(1),
        default=30,
        metavar="S",
        help="from SIGTERM to SIGKILL where another process has failed (30)",
    )
    return parser


def _whole(least: int):
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return number


if __name__ == "__main__":
    sys.exit(main())
