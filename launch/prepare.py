"""Prepare data: `python -m shampax.launch.prepare --config=FILE.py[:VARIANT] --output=DIR [--config.KEY=VALUE ...]`.

Makes the rows that the config's data set is read by, once, in DIR, local or gs://: tokens or parsed fields in shards of
ArrayRecord files, with a manifest. `shampax.launch.train` with --config.data.prepared=DIR reads them; its batches are
bitwise those of a run that prepares in its workdir. Several preparations may lie in one DIR.

--workers=N uses N cores. --process=I/N makes share I, from 0, of N: the same command on N hosts, or N times here, at
one time or one after another. None waits for another, and the last to finish writes the manifest. Each that does not
find a tokenizer trains it; all get the same one. What was killed goes on with the shards that are missing, by the same
command.

Exit codes: 0, this process' share is made; 2, something given cannot work; 130, interrupted.
"""

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Sequence

from ..framework.base import paths
from ..framework.base.errors import UserError
from ..framework.config import components
from ..framework.config.check import load
from . import flags

_EXAMPLES = {
    "--config": "--config=shampax/configs/lm.py:sample",
    "--output": "--output=/data/lm_sample",
    "--workers": "--workers=8",
    "--process": "--process=0/4",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; see the module. `arguments` are those of this process by default. Returns the exit code."""
    try:
        given, overrides, wants_help = flags.read(sys.argv[1:] if arguments is None else arguments, _EXAMPLES)
        if wants_help:
            print(__doc__)
            return 0
        for flag in ("--config", "--output"):
            if flag not in given:
                raise UserError(f"{flag} is missing; add for example {_EXAMPLES[flag]}")
        process, processes = _process(given.get("--process", "0/1"))
        workers = _workers(given.get("--workers", str(os.cpu_count() or 1)))
        _prepare(given["--config"], overrides, given["--output"], workers, process, processes)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with the shards that are missing", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _prepare(spec: str, overrides: Sequence[str], output: str, workers: int, process: int, processes: int) -> None:
    config = load(spec, overrides)
    # Imported when the config is known to be good: this brings JAX with it.
    from ..framework.data.preparing import preparing

    data = components.build(config.data)
    if not isinstance(data, preparing.Preparable):
        raise UserError(
            f"{config.data.name} has nothing to prepare: it reads its source as it is; images are read from the "
            "records of a tfds set, which are ArrayRecord already (tfds build NAME --file_format=array_record)"
        )
    place = paths.of(output)
    manifest = preparing.run(
        dataclasses.replace(data, prepared=""), place, workers=workers, process=process, processes=processes
    )
    if manifest is None:
        print(f"share {process} of {processes} is made in {place}; shards of others are missing, the last joins them")
    else:
        print(f"prepared in {place}: train with --config={spec} --config.data.prepared={place}")


def _process(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--process is {text!r}; write I/N with I from 0 to N - 1, as in {_EXAMPLES['--process']}")
    return int(match[1]), int(match[2])


def _workers(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise UserError(f"--workers is {text!r}; give a number of processes, as in {_EXAMPLES['--workers']}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
