"""Draw training runs: `shampax report WORKDIR [WORKDIR ...] [--baseline=WORKDIR] [--watch] [--output=DIR]`.

Writes a page, `index.html`, which needs no other file and no network. Runs whose configs are equal except for the seed
are drawn as one curve, their mean, with their range as a band. With --watch it writes the page again while runs
train, and a browser that shows it reads it again. Workdirs may be in buckets; the page is then written here.

Exit codes: 0; 2, invalid input; 130, stopped by Ctrl-C.
"""

import os
import pathlib
import sys
import time
from collections.abc import Sequence

from ..framework.base import paths
from ..framework.base.errors import UserError
from ..framework.base.paths import Path
from ..framework.reporting.page import page
from ..framework.reporting.runs import Reader, Run
from ..framework.reporting.status import state
from . import flags

_REFRESH = 15  # seconds between two writes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("report", __doc__)
    parser.add_argument("workdirs", nargs="+", type=paths.given, metavar="WORKDIR", help="workdir of a training run")
    parser.add_argument(
        "--output",
        type=paths.given,
        metavar="DIR",
        help="where to write (default: report/ in the workdir, or in the folder that all workdirs share; "
        "here if one is in a bucket)",
    )
    parser.add_argument(
        "--baseline",
        type=paths.given,
        metavar="WORKDIR",
        help="run to compare the others with (default: the first without Shampoo, or else the first)",
    )
    parser.add_argument("--watch", action="store_true", help="write the page again until all runs have ended")
    options, _ = parser.parse(arguments)
    output = options.output or default_output(options.workdirs)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: a file. Name a folder.")
    # `runs/*` also names the folder of an earlier report.
    readers = [Reader(path) for path in options.workdirs if paths.of(path) != paths.of(output)]
    runs = _write(readers, output, options.baseline, _REFRESH if options.watch else 0)
    for run in runs:
        print(f"{run.path}: {state(run).told}")
        print(*(f"note: {note}\n" for note in run.notes), sep="", end="")
    print(f"Page (one file, opens in any browser): {output / 'index.html'}", flush=True)
    while options.watch and any(state(run).kind == "running" for run in runs):
        time.sleep(_REFRESH)
        runs = _write(readers, output, options.baseline, _REFRESH)
    if options.watch:
        _write(readers, output, options.baseline, 0)
    return 0


def _write(readers: Sequence[Reader], output: Path, baseline: Path | None, refresh: float) -> list[Run]:
    runs = [reader.read() for reader in readers]
    content = page(runs, baseline=baseline, reload_seconds=refresh)
    output.mkdir(parents=True, exist_ok=True)
    paths.write_text(output / "index.html", content)  # whole, for a browser that reads meanwhile
    return runs


def default_output(workdirs: Sequence[Path]) -> Path:
    """Return `report/` in the only workdir, or in the folder that all workdirs share; here if one is in a bucket.

    Raises:
      UserError: they share none.
    """
    if not all(map(paths.is_local, workdirs)):
        return pathlib.Path("report")
    shared = pathlib.Path(os.path.commonpath([os.path.abspath(path) for path in workdirs]))
    if shared == pathlib.Path(shared.anchor):
        raise UserError(f"the {len(workdirs)} workdirs share no folder. Name one for the report: --output=DIR.")
    return pathlib.Path(os.path.relpath(shared / "report"))


if __name__ == "__main__":
    sys.exit(main())
