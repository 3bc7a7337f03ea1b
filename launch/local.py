"""Run a command in several processes of this machine, as on a cluster.

    shampax local [--processes=N] [--devices=M] [--grace_seconds=S] -- VERB ...

VERB is a module of shampax.launch, such as train, or the dotted name of any other module. Each process simulates its
own devices, and the processes connect over loopback. Each line of output starts with the number of its process.

    shampax local --processes=2 --devices=2 -- \\
        train --config=shampax/configs/lm.py:sample --workdir=runs/two

If one process fails, the others get SIGTERM and, after the grace, SIGKILL. Ctrl-C and SIGTERM are passed on to all
processes, which save and stop. If this process dies, so do they.

Exit codes: 0; 2, invalid input; else that of the first process that failed, 128 + N if signal N ended it.
"""

import os
import secrets
import socket
import sys
from collections.abc import Sequence

from ..framework.base.errors import UserError
from ..framework.distributed import cluster
from . import environment, flags, gang

_FLAGS = (  # name, default, meaning
    ("processes", 2, "number of processes"),
    ("devices", 1, "simulated devices per process"),
    ("grace_seconds", 30, "seconds from SIGTERM to SIGKILL after another process has failed"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code; `arguments` default to those of this process."""
    return flags.run(lambda: _run(list(sys.argv[1:] if arguments is None else arguments)))


def _run(given: list[str]) -> int:
    parser = flags.Parser("local", __doc__)
    for name, default, meaning in _FLAGS:
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{meaning} ({default})")
    divider = given.index("--") if "--" in given else len(given)
    (options, _), command = parser.parse(given[:divider]), given[divider + 1 :]
    for name, value in vars(options).items():
        if value < 1:
            raise UserError(f"--{name}={value}: must be at least 1.")
    if not command:
        raise UserError("no command. Write it after --, e.g. -- train --config=... --workdir=...")
    module = command[0] if "." in command[0] else f"{__package__}.{command[0]}"
    failure = gang.run(
        [sys.executable, "-m", module, *command[1:]],
        _environments(options.processes, options.devices),
        grace_seconds=options.grace_seconds,
    )
    if failure is None:
        return 0
    print(f"local: {failure}", file=sys.stderr, flush=True)
    return failure.code


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


if __name__ == "__main__":
    sys.exit(main())
