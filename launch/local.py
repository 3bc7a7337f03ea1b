"""Run a command in several processes of this machine, as on a cluster.

    python -m shampax.launch.local [--processes=N] [--devices=M] [--max_restarts=N] [--grace_seconds=S] -- VERB ...

VERB is a module of shampax.launch, such as train, or the dotted name of any other module. Each process simulates its
own devices, and the processes connect over loopback. Each line of output starts with the number of its process.

    python -m shampax.launch.local --processes=2 --devices=2 --max_restarts=3 -- \\
        train --config=shampax/configs/lm.py:sample --workdir=runs/two

If one process fails, the others get SIGTERM and, after the grace, SIGKILL. Ctrl-C and SIGTERM are passed on to all
processes, which save and stop; after a second one they are killed once the grace is over. If this process dies, so do
they.

Exit codes: 0; 2, invalid input; else that of the first process that failed, 128 + N if signal N ended it.
--max_restarts restarts all processes after a failure, except after code 2 or a signal.
"""

import importlib.util
import os
import pkgutil
import secrets
import socket
import sys
from collections.abc import Sequence

from ..framework.base.errors import UserError, did_you_mean
from ..framework.distributed import cluster
from . import environment, flags
from .gang import Gang

_PACKAGE = __package__ or ""
_REFUSED = 2
_FLAGS = (  # name, lowest value, default, meaning
    ("processes", 1, 2, "number of processes"),
    ("devices", 1, 1, "simulated devices per process"),
    ("max_restarts", 0, 0, "restarts of all processes after failures"),
    ("grace_seconds", 1, 30, "seconds from SIGTERM to SIGKILL after another process has failed"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code; `arguments` default to those of this process."""
    return flags.run(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(given: list[str]) -> int:
    parser = flags.Parser("local", __doc__)
    for name, _, default, meaning in _FLAGS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    divider = given.index("--") if "--" in given else len(given)
    (options, _), command = parser.parse(given[:divider]), given[divider + 1 :]
    for name, least, _, _ in _FLAGS:
        if getattr(options, name) < least:
            raise UserError(f"--{name}={getattr(options, name)}: must be at least {least}.")
    if not command:
        raise UserError("no command. Write it after --, e.g. -- train --config=... --workdir=...")
    restarts = 0
    with Gang([sys.executable, "-m", _module(command[0]), *command[1:]], grace_seconds=options.grace_seconds) as gang:
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
        cluster.SECRET: secrets.token_hex(),
        "PYTHONUNBUFFERED": "1",  # write lines at once
    }
    return [{**shared, cluster.INDEX: str(index)} for index in range(processes)]


def _module(name: str) -> str:
    verbs = [module.name for module in pkgutil.iter_modules(sys.modules[_PACKAGE].__path__)]
    if name in verbs:
        return f"{_PACKAGE}.{name}"
    if "." not in name:
        raise UserError(f"{name!r} is neither a module of {_PACKAGE} nor a dotted name{did_you_mean(name, verbs)}")
    top = name.partition(".")[0]
    if importlib.util.find_spec(top) is None:
        raise UserError(f"module {top!r} is not in {os.getcwd()}, in PYTHONPATH or installed.")
    return name


def _say(text: str) -> None:
    print(f"local: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
