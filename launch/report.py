"""Draw training runs: `shampax report WORKDIR [WORKDIR ...] [--output=DIR]`.

Writes a page, `index.html`, which needs no other file and no network. Runs whose configs are equal except for the seed
are drawn as one curve, their mean, with their range as a band.

Exit codes: 0; 2, invalid input.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ..framework.base.errors import UserError
from ..framework.reporting.page import page, state
from ..framework.reporting.runs import read_run
from . import flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the verb and return its exit code. `arguments` defaults to those of this process."""
    return flags.run(lambda: _main(arguments))


def _main(arguments: Sequence[str] | None) -> int:
    parser = flags.Parser("report", __doc__)
    parser.add_argument("workdirs", nargs="+", type=Path, metavar="WORKDIR", help="workdir of a training run")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="where to write (default: report/ in the workdir, or in the folder that all workdirs share)",
    )
    options, _ = parser.parse(arguments)
    output = options.output or default_output(options.workdirs)
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output}: a file. Name a folder.")
    # `runs/*` also names the folder of an earlier report.
    runs = [read_run(path) for path in options.workdirs if path.resolve() != output.resolve()]
    content = page(runs)
    output.mkdir(parents=True, exist_ok=True)
    (output / "index.html").write_text(content, encoding="utf-8")
    for run in runs:
        print(f"{run.path}: {state(run)}, {len(run.points)} measured steps")
        print(*(f"note: {note}\n" for note in run.notes), sep="", end="")
    print(f"Page (one file, opens in any browser): {output / 'index.html'}")
    return 0


def default_output(workdirs: Sequence[Path]) -> Path:
    """Return `report/` in the only workdir, or in the folder that all workdirs share.

    Raises:
      UserError: they share none.
    """
    shared = Path(os.path.commonpath([os.path.abspath(path) for path in workdirs]))
    if shared == Path(shared.anchor):
        raise UserError(f"the {len(workdirs)} workdirs share no folder. Name one for the report: --output=DIR.")
    return Path(os.path.relpath(shared / "report"))


if __name__ == "__main__":
    sys.exit(main())
