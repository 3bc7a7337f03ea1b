"""Prepare data: `shampax prepare --config=FILE.py[:VARIANT] --output=DIR [--config.KEY=VALUE ...]`.

Writes the rows of the config's data set to DIR (local or gs://) once: tokens or parsed fields in ArrayRecord shards,
with a manifest. `shampax train` with --config.data.prepared=DIR reads them; its batches are bitwise those of a
run that prepares in its workdir. It stops at the training rows that the config's duration takes; a longer duration
adds the missing ones. A DIR may hold several preparations. The sets of `mixture` and `evaluation.sets` are made last.

--process=I/N makes share I (from 0) of N: run the same command on N hosts, or N times here, at once or one after
another. No process waits for another, and the last to finish writes the manifest and makes the sets of
`evaluation.sets`. After an interruption, rerun the same command: it makes only the missing shards.

Exit codes: 0, this share is complete; 2, invalid input; 130, interrupted.
"""

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from ..framework.base import paths
from ..framework.base.errors import UserError
from ..framework.config import components
from ..framework.config.check import load
from ..framework.config.sets import OWN, heldout_sets, mixture
from . import flags, interruptible


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _prepare(arguments))


def _prepare(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("prepare", __doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--output", required=True, metavar="DIR", help="local or gs://")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes (one a core)")
    parser.add_argument("--process", default="0/1", metavar="I/N", help="make share I of N")
    options, overrides = parser.parse(arguments)
    if options.workers < 1:
        raise UserError(f"--workers={options.workers}: must be at least 1. Give a number of processes.")
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", options.process)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--process={options.process}: not a share. Write I/N with I from 0 to N - 1, as in 0/4.")
    process, processes = int(match[1]), int(match[2])
    config = load(options.config, overrides)
    # Imported after the config is checked: this imports JAX.
    from ..framework import dataset
    from ..framework.data.feed import length
    from ..framework.data.preparing import preparing

    interruptible()
    data = components.build(config.data)
    if not isinstance(data, preparing.Preparable):
        raise UserError(
            f"config.data.name={config.data.name}: nothing to prepare, the data set reads its source directly. For "
            "images, make ArrayRecord files with tfds build NAME --file_format=array_record."
        )
    place = paths.of(options.output)
    training: Any = dataclasses.replace(data, prepared="")
    needed, _ = length(config, training, mixture(config))
    work = {"workers": options.workers, "extend": True}
    most = needed.get(OWN, 0)
    manifest = preparing.run(training, place, process=process, processes=processes, most=most, **work)
    for name, each in heldout_sets(config).items() if manifest else ():
        further: Any = dataset.beside(each, training, options.output)
        if isinstance(further, preparing.Preparable):
            preparing.run(dataclasses.replace(further, prepared=""), place, most=needed.get(name, 0), **work)
    if manifest is None:
        print(f"share {process} of {processes} is complete in {place}; shards of other shares are missing")
    else:
        knobs = [f"--config.{each}" for each in (*overrides, f"data.prepared={place}")]
        words = shlex.join([f"--config={options.config}", *knobs])
        print(f"prepared in {place}: train with shampax train --workdir=WORKDIR {words}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
